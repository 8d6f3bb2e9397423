# ruff: noqa
"""Stages and early stages of each kernel of a token: python bench/prototypes/stages.py llama-8b

One kernel at a time (IN: gate and up, DOWN, QKV, OUT), "stages/early": what a token costs more than as it is now, in
microseconds, at depth 0 and at 4,096.
"""
import builtins, sys
from pathlib import Path
from dataclasses import replace
sys.path[:0] = ["bench", "bench/prototypes"]
import numpy as np
import gpu as bench
from common import graph_of, launches_at
from headrace.backend import PAGE_SIZE
from headrace.cuda import products, arguments as c
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
from headrace.cuda.tuning import tuning_for
model = sys.argv[1]
decoder = bench.synthetic(model, "Q4_K_M", Path("/tmp"))
device = CUDADevice()
first = CUDARunner(decoder, device, **best_options(device))
config = {}
real = products.matvec
def name(epilogue, k):
    kind = type(epilogue).__name__
    return {"Rotary": "QKV", "Product": "IN", "Store": "HEAD"}.get(kind) or ("OUT" if k == decoder.config.d_model else "DOWN")
real_shape = products.matvec_shape
now = [None]
def matvec(device, matrices, x, epilogue, n_rows, **kw):
    now[0] = config.get(name(epilogue, matrices[0].layout.k))
    return real(device, matrices, x, epilogue, n_rows, **kw)
def shape(device, matrices, rows, *, tuning, **kw):
    if now[0] is None: return real_shape(device, matrices, rows, tuning=tuning, **kw)
    t = replace(tuning); object.__setattr__(t, "matvec_stages", now[0][0]); object.__setattr__(t, "matvec_early", now[0][1])
    return free_shape(device, matrices, rows, tuning=t, **kw)
import inspect
src = inspect.getsource(real_shape)
for old, new in (("min(tuning.matvec_stages, max(2, tiles_of(warps) // 2))", "tuning.matvec_stages"), ("min(tuning.matvec_early, stages, max(1, tiles_of(warps) - 1))", "min(tuning.matvec_early, stages)")):
    assert old in src
    src = src.replace(old, new)
space = dict(vars(products)); exec("from __future__ import annotations\n" + src, space); free_shape = space["matvec_shape"]
products.matvec_shape = shape
products.matvec = matvec
def runner_of(cfg, pages=8):
    config.clear(); config.update(cfg)
    r = CUDARunner(decoder, device, weights=first.executor.weights, **best_options(device))
    r.allocate_cache(pages)
    return r
PAGES = 16384 // PAGE_SIZE + 8
def us(cfg, depths=(0, 4096)):
    r = runner_of(cfg, PAGES); out = []
    for d in depths:
        g = graph_of(device, launches_at(r.executor, d)); out.append(bench.timed(device, g.launch, 16)["median"]); g.close()
    r.close()
    return np.array(out)
OPTIONS = {"IN": [(2, 2), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4)], "DOWN": [(2, 2), (3, 1), (3, 2), (3, 3), (2, 1)], "QKV": [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)], "OUT": [(1, 1), (2, 1), (2, 2), (1, 0), (2, 0)]}
specs = {}
for k, os_ in OPTIONS.items():
    for o in os_:
        r = runner_of({k: o}); specs |= {l.spec: 0 for l in launches_at(r.executor, 0)}; r.close()
device.prepare(specs)
best = {}
for k, os_ in OPTIONS.items():
    base = us(best)
    row = [(us(best | {k: o}) - base, o) for o in os_]
    print(k, "base", base.round(1), "  ".join(f"{o[0]}/{o[1]} {v[0]:+.1f} {v[1]:+.1f}" for v, o in row), flush=True)
    v, o = min(row, key=lambda r: r[0].sum())
    if v.sum() < -3: best[k] = o
print("best", best, us({}, (0, 4096, 16384)).round(1), us(best, (0, 4096, 16384)).round(1), flush=True)
