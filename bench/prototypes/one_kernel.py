"""MODEL WARPS AHEAD [DEPTHS] : bit-equality and times of the one kernel beside the launches."""
import sys, numpy as np
sys.path.insert(0, 'bench'); sys.path.insert(0, 'tests/support')
import batches
from pathlib import Path
import gpu as B
from headrace.cuda import token as tk
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
from headrace.backend import PAGE_SIZE
model, warps, ahead = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
depths = [int(i) for i in sys.argv[4].split(',')] if len(sys.argv) > 4 else [0, 4096, 16384]
tk.WARPS, tk.AHEAD = warps, ahead
decoder = B.synthetic(model, 'Q4_K_M', Path('/tmp'))
device = CUDADevice()
runners = {}
for name, more in (('launches', {}), ('one', {'one_kernel': True})):
    runners[name] = CUDARunner(decoder, device, **best_options(device), **more)
    runners[name].allocate_cache(max(depths) // PAGE_SIZE + 8)
def logits(r):
    return np.concatenate([r.step(batches.one_sequence([7 + i], i, [0])) for i in range(5)])
a = logits(runners['launches']); print('launches done', flush=True)
b = logits(runners['one'])
print('equal', np.array_equal(a, b), np.abs(a - b).max(), 'stages', dict(tk.token_shape(decoder, device).constants)['STAGES'], 'grid', tk.token_shape(decoder, device).grid, flush=True)
for depth in depths:
    out = []
    for name, r in runners.items():
        d = B.decode(r, depth)
        out.append(f"{name} {d['us']['median']:.0f} us {1e6 / d['us']['median']:.0f} tok/s")
    print(model, warps, ahead, depth, '; '.join(out), flush=True)
