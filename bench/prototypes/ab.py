# ruff: noqa
"""A token with other kernels and with these, in turn: python bench/prototypes/ab.py llama-8b 0,4096,16384 FOLDER...

Each folder is a copy of src/headrace/cuda/kernels at another commit.
"""
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
sys.path[:0] = ["bench", "bench/prototypes"]
from headrace.backend import PAGE_SIZE
from headrace.cuda import compile as compiler
from headrace.cuda.gpu import CUDADevice
from common import graph_of, launches_at
import gpu as bench
from headrace.cuda.runner import CUDARunner, best_options
model, depths, folders = sys.argv[1], [int(d) for d in sys.argv[2].split(",")], sys.argv[3:]
decoder = bench.synthetic(model, "Q4_K_M", Path("/tmp"))
device = CUDADevice()
runner = CUDARunner(decoder, device, **best_options(device))
runner.allocate_cache(max(depths) // PAGE_SIZE + 8)
original = compiler.KERNELS
results = {}
for name in (*folders, "now", *folders, "now"):
    compiler.KERNELS = original if name == "now" else Path(name)
    compiler._sources_digest.cache_clear(); device._functions.clear()
    for depth in depths:
        g = graph_of(device, [replace(l) for l in launches_at(runner.executor, depth)])
        us = bench.timed(device, g.launch, 16)
        logits = device.download(runner.executor.lowering.arena["logits"])[0]
        g.close()
        equal = np.array_equal(results.setdefault(depth, logits), logits)
        print(f"{model} {name:20} {depth:6} {us['median']:.1f} ({us['low']:.1f} to {us['high']:.1f})", "bit-equal" if equal else "DIFFERENT", flush=True)
