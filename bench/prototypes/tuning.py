import sys, numpy as np
sys.path.insert(0, 'bench')
from pathlib import Path
import gpu as B
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.products import Tuning
from headrace.cuda.runner import CUDARunner, best_options
from headrace.backend import PAGE_SIZE
model, depths = sys.argv[1], [int(i) for i in sys.argv[2].split(',')]
decoder = B.synthetic(model, 'Q4_K_M', Path('/tmp'))
for one in sys.argv[3:]:
    device = CUDADevice()
    more = {'one_kernel': True} if one == 'one' else {'tuning': Tuning(*map(int, one.split(',')))}
    try:
        r = CUDARunner(decoder, device, **best_options(device), **more)
        r.allocate_cache(max(depths) // PAGE_SIZE + 8)
        print(model, one, *(f"{d}: {B.decode(r, d)['us']['median']:.0f}" for d in depths), flush=True)
        r.close()
    except Exception as e: print(one, repr(e)[:200], flush=True)
