import sys, numpy as np
sys.path.insert(0, 'bench'); sys.path.insert(0, 'tests/support')
import batches
from pathlib import Path
import gpu as B
from headrace.cuda import launchers as L
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
from headrace.backend import PAGE_SIZE
model, depths = sys.argv[1], [int(i) for i in sys.argv[2].split(',')]
decoder = B.synthetic(model, 'Q4_K_M', Path('/tmp'))
old = L.attend_constants
for one in sys.argv[3:]:
    warps, keys, joined = (int(x) for x in one.split(',')[:3])
    L.ATTEND_WARPS, L.SPLIT = warps, -(-32 * warps // 64) * 64
    L.attend_constants = lambda *a, **k: old(*a, **k) | {'KEYS_AHEAD': keys, 'JOINED_AT_ONCE': joined}
    device = CUDADevice()
    r = CUDARunner(decoder, device, **best_options(device))
    r.allocate_cache(max(depths) // PAGE_SIZE + 8)
    print(model, one, ' '.join(f"{depth}: {B.decode(r, depth)['us']['median']:.0f}" for depth in depths), flush=True)
    r.close()
