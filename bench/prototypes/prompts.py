import sys
sys.path.insert(0, 'bench')
from pathlib import Path
import gpu as B
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
decoder = B.synthetic('llama-8b', 'Q4_K_M', Path('/tmp'))
for rows in (1024, 2048, 1536, 1024, 2048):
    device = CUDADevice()
    r = CUDARunner(decoder, device, **best_options(device) | {'prompt_rows': rows})
    r.allocate_cache(80)
    for n in (512, 4096):
        p = B.prefill(r, n); print(rows, n, round(p['tok_per_s']), {k: round(v) for k, v in p['us'].items()}, flush=True)
    r.close()
