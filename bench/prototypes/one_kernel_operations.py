"""MODEL DEPTHS LAUNCHES? CONFIG(WARPS,AHEAD)... : time of each operation of the one kernel."""
import sys, numpy as np, collections
sys.path.insert(0, 'bench'); sys.path.insert(0, 'tests/support')
import batches
from pathlib import Path
import gpu as B
from headrace.cuda import token as tk
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
from headrace.backend import PAGE_SIZE
model, depths = sys.argv[1], [int(i) for i in sys.argv[2].split(',')]
decoder = B.synthetic(model, 'Q4_K_M', Path('/tmp'))

def show(label, **more):
    device = CUDADevice()
    r = CUDARunner(decoder, device, **best_options(device), **more)
    r.allocate_cache(max(depths) // PAGE_SIZE + 8)
    for depth in depths:
        d = B.decode(r, depth)
        ins = r.instrument()
        pages = list(range(depth // PAGE_SIZE + 1))
        total = collections.defaultdict(list)
        for i in range(20):
            b = batches.one_sequence([7], depth, [0], pages)
            ins.prepare(b); ins.timed_step(b)
            if i < 5: continue
            sums = collections.defaultdict(lambda: [0.0, 0.0])
            for s in ins.spans():
                sums[s.part.name][0] += (s.end - s.start) * 1e6; sums[s.part.name][1] += s.waiting * 1e6
            for k, v in sums.items(): total[k].append(v)
        print(f"{label} depth {depth}: {d['us']['median']:.0f} us {d['tok_per_s']:.0f} tok/s | " + '; '.join(
            f"{k[:18]} {np.median([x[0] for x in v]):.0f} (w {np.median([x[1] for x in v]):.0f})" for k, v in total.items()), flush=True)
    r.close()
for one in sys.argv[3:]:
    if one == 'launches': show('launches')
    else:
        tk.WARPS, tk.AHEAD = map(int, one.split(','))
        show(f'{model} one {one}', one_kernel=True)
