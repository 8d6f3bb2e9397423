# ruff: noqa
"""The code of a matvec run once before the wait: python bench/prototypes/warm.py llama-8b 0,16384

Patches a copy of the kernels: while it waits for the kernel before, a block multiplies what happens to lie in its
shared memory and throws the results away, so that the instructions are in the cache when they are needed.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, "bench")
from headrace.backend import PAGE_SIZE, Batch
from headrace.cuda import compile as compiler
from headrace.cuda.gpu import CUDADevice
from common import Patch, graph_of, launches_at


def patch(folder: Path, tile: bool, epilogue: bool) -> None:
    sub = Patch(folder)
    sub("matvec.cu",
        ("  BEGIN(a);\n  a.out.fetch", "  RowNorm<K> norm;\n  const int normed = WARPS - 1 - warp;\n  const X x = x_at<K, ROWS, FLOAT_ACTIVATIONS>(x_memory);\n#pragma unroll 1\n  for (int pass = 0; pass < 2; ++pass) {\n  pass = kept(pass);\n  if (pass) {\n  BEGIN(a);\n  a.out.fetch"),
        ("  const int normed = WARPS - 1 - warp;  // the last warps: the first are busy with x\n  RowNorm<K> norm;\n", ""),
        ("  const X x = x_at<K, ROWS, FLOAT_ACTIVATIONS>(x_memory);\n\n  int t = warp;", "  }\n  int t = warp;"),
        ("unit < last; unit += PASS_UNITS) {", "unit < (pass ? last : first + 1); unit += PASS_UNITS) {"),
        ("const int units = min(PASS_UNITS, last - unit)", "const int units = pass ? min(PASS_UNITS, last - unit) : 1"),
        ("for (const int end = (base + units * UNIT_GROUPS) * SLICES; t < end; t += WARPS)", f"for (const int end = pass ? (base + units * UNIT_GROUPS) * SLICES : {'warp + 1' if tile else '0'}; t < end; t += WARPS)"),
        ("      request(ring.stage, t + STAGES * WARPS);\n      ring.advance();", "      if (pass) request(ring.stage, t + STAGES * WARPS), ring.advance();"),
        ("      if (lane % share == 0) {", "      if (pass && lane % share == 0) {"),
        ("[&] { return ring.wait(); }", "[&] { return pass ? ring.wait() : (const u8*)ring.stages; }"),
        ("R& ring, const X& x,", "R& ring, int pass, const X& x,"),
        ("dot_type<TYPE0>(sum, ring,", "dot_type<TYPE0>(sum, ring, pass,"), ("dot_type<TYPE1>(sum, ring,", "dot_type<TYPE1>(sum, ring, pass,"), ("dot_type<TYPE2>(sum, ring,", "dot_type<TYPE2>(sum, ring, pass,"),
        ("    const int all = units * UNIT_ROWS * rows;", f"    const int all = {'units' if epilogue else '(pass ? units : 0)'} * UNIT_ROWS * rows;"),
        ("gate, up, mine.live)", "gate, up, pass && mine.live)"),
        ("+ bias, mine.live)", "+ bias, pass && mine.live)"),
        ("    if (unit + PASS_UNITS < last) sync_block();\n  }\n", "    if (!pass || unit + PASS_UNITS < last) sync_block();\n  }\n  }\n"),
    )  # fmt: skip


def main() -> None:
    original = compiler.KERNELS
    import gpu as bench
    from headrace.cuda.runner import CUDARunner, best_options

    decoder = bench.synthetic(sys.argv[1], "Q4_K_M", Path("/tmp"))
    device = CUDADevice()
    runner = CUDARunner(decoder, device, **best_options(device))
    depths = [int(d) for d in sys.argv[2].split(",")]
    runner.allocate_cache(max(depths) // PAGE_SIZE + 8)
    folders = {"as it is": original}
    for name, tile, epilogue in (("tile and epilogue", 1, 1), ("epilogue", 0, 1), ("tile", 1, 0)):
        folders[name] = Path(tempfile.mkdtemp()) / "kernels"
        shutil.copytree(original, folders[name])
        patch(folders[name], tile, epilogue)
    results = {}
    for name in (*folders, "as it is"):
        compiler.KERNELS = folders[name]
        compiler._sources_digest.cache_clear()
        device._functions.clear()
        for depth in depths:
            launches = [replace(launch) for launch in launches_at(runner.executor, depth)]
            graph = graph_of(device, launches)
            us = bench.timed(device, graph.launch, 16)
            logits = device.download(runner.executor.lowering.arena["logits"])[0]
            graph.close()
            equal = np.array_equal(results.setdefault(depth, logits), logits)
            print(
                f"{name:20} {depth:6} {us['median']:.0f} ({us['low']:.0f} to {us['high']:.0f})",
                "bit-equal" if equal else "DIFFERENT",
                flush=True,
            )


main()
