# ruff: noqa
"""Memory kept busy between kernels: python bench/prototypes/ahead.py llama-8b 0,4096,16384 tiles:16 tiles:32 end:32 asked:32

Patches a copy of the kernels: a block asks L2 for the first so many tiles of the same block of the next product, when its
warps have `asked` for all their own tiles, have done (`tiles`) them, or at the kernel's `end`. Times a token as a graph without the choice.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, "bench")
from headrace.backend import PAGE_SIZE
from headrace.cuda import compile as compiler
from headrace.cuda import launchers
from common import Patch, graph_of, launches_at

TILE = {"Q4_K": 2304, "Q6_K": 3360}


def patch(folder: Path, where: str) -> None:
    sub = Patch(folder)

    sub("primitives.cuh", ("#define BEGIN(a) dependency_wait(); Stopwatch stopwatch(a.stamps)", """
struct Ahead { ulonglong2 a, b; };
DEVICE Ahead ahead_of(const u64* table) {
  const ulonglong2* p = (const ulonglong2*)table + 2 * ((u64)(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  return {p[0], p[1]};
}
DEVICE void ask(const Ahead& x, int warp, int warps) {
  const u32 a = (u32)x.a.y / warps / 16 * 16, b = (u32)x.b.y / warps / 16 * 16;
  if (a) prefetch_l2((const u8*)x.a.x + a * warp, a);
  if (b) prefetch_l2((const u8*)x.b.x + b * warp, b);
}
#define BEGIN(a) dependency_wait()"""))  # fmt: skip
    calls = {
        "asked": ("      sync_warp();\n      request(ring.stage, t + STAGES * WARPS);\n",
                  "      sync_warp();\n      request(ring.stage, t + STAGES * WARPS);\n      if (TIMED && t + STAGES * WARPS >= tiles && t + (STAGES - 1) * WARPS < tiles) ask(ahead, warp, WARPS);\n"),
        "tiles": ("    sync_block();\n\n    auto result", "    if (TIMED) ask(ahead, warp, WARPS);\n    sync_block();\n\n    auto result"),
        "end": ("    if (unit + PASS_UNITS < last) sync_block();\n  }\n", "    if (unit + PASS_UNITS < last) sync_block();\n  }\n  if (TIMED) ask(ahead, warp, WARPS);\n"),
    }  # fmt: skip
    text = "#if TIMED\n  const Ahead ahead = ahead_of((const u64*)a.stamps);\n#else\n  struct Ahead {} ahead; auto ask = [](auto...) {};\n#endif\n"
    sub("matvec.cu", ("  dependents_launch();\n", "  dependents_launch();\n" + text), calls[where])
    text = text.replace("a.stamps", "args.stamps")
    sub("attend.cu", ("  dependents_launch();\n", "  dependents_launch();\n" + text + "  auto asking = [&] { if (TIMED) ask(ahead, threadIdx.x >> 5, ATTEND_WARPS); };\n"),
        ("    attend_split(a, now, split, shared, arrived, threadIdx.x, read, sync_block);\n",
         "    attend_split(a, now, split, shared, arrived, threadIdx.x, [&](Warp& w, const uint4* q) { read(w, q); "
         + ("asking();" if where != "end" else "") + " }, sync_block);\n" + ("    asking();\n" if where == "end" else "")))  # fmt: skip


def first_tiles(launch, tiles: int) -> list[list[tuple[int, int]]]:
    """Of each block: contiguous (address, bytes) of its first so many tiles, as matvec.cu and cut.cuh say."""
    m = dict(launch.spec.macros)
    grid, unit_rows, slices = int(m["GRID"]), int(m["UNIT_ROWS"]), int(m["K"]) // 1024
    types = [m[f"TYPE{i}"] for i in range(3)]
    rows = [-(-int(m[f"N{i}"]) // 16) * 16 if types[i] != "NONE" else 0 for i in range(3)]
    size = [TILE.get(t, 0) for t in types]
    weights = list(launch.arguments.weights)
    units = [r // unit_rows for r in rows]
    paired = m["PAIRED"] == "1"

    def first_unit(b: int) -> int:
        if paired or types[1] == "NONE":
            return -(-units[0] * b // grid)
        cost = [u * (unit_rows // 4) * s * slices for u, s in zip(units, size)]
        each = [(unit_rows // 4) * s * slices for s in size]
        target = sum(cost) * b // grid
        if target <= cost[0]:
            return -(-target // each[0])
        target -= cost[0]
        if types[2] == "NONE" or target <= cost[1]:
            return units[0] + -(-target // each[1])
        return units[0] + units[1] + -(-(target - cost[1]) // each[2])

    result = []
    for b in range(grid):
        first, last = first_unit(b), first_unit(b + 1)
        half = unit_rows // 4
        spans: list[tuple[int, int]] = []
        for t in range(min(tiles, (last - first) * half * (2 if paired else 1) * slices)):
            g, s = divmod(t, slices)
            if paired:
                segment, group = (
                    int(g % (2 * half) >= half),
                    (first + g // (2 * half)) * half + g % half,
                )
            else:
                segment, group = 0, first * half + g
                for i in range(2):
                    if segment == i and rows[i + 1] and group >= rows[i] // 4:
                        segment, group = i + 1, group - rows[i] // 4
            at = weights[segment] + (group * slices + s) * size[segment]
            for i, (a, n) in enumerate(spans):
                if a + n == at:
                    spans[i] = a, n + size[segment]
                    break
            else:
                spans.append((at, size[segment]))
        result.append(sorted(spans, key=lambda span: -span[1])[:2])
    return result


def main() -> None:
    original = compiler.KERNELS
    import gpu as bench
    from headrace.cuda.gpu import CUDADevice
    from headrace.cuda.runner import CUDARunner, best_options

    decoder = bench.synthetic(sys.argv[1], "Q4_K_M", Path("/tmp"))
    device = CUDADevice()
    runner = CUDARunner(decoder, device, **best_options(device))
    depths = [int(d) for d in sys.argv[2].split(",")]
    runner.allocate_cache(max(depths) // PAGE_SIZE + 8)
    executor = runner.executor

    def token_us(depth: int, tiles: int) -> str:
        plain = launches_at(executor, depth)
        launches, tables = [], []
        for i, launch in enumerate(plain):
            following = plain[i + 1] if i + 1 < len(plain) else None
            if (
                not tiles
                or following is None
                or following.spec.name != "matvec"
                or launch.spec.name not in ("matvec", "attend")
            ):
                launches.append(replace(launch))
                continue
            blocks = int(np.prod(launch.grid))
            table = np.zeros((blocks, 4), np.uint64)
            for row, spans in zip(table, first_tiles(following, tiles)):
                for k, (a, n) in enumerate(spans):
                    row[2 * k : 2 * k + 2] = a, n
            if blocks < 100:
                table[:] = 0
            address = device.allocate(table.nbytes, "table")
            device.upload(address, table)
            tables.append(address)
            launches.append(launchers.timed(launch, address))
        graph = graph_of(device, launches)
        us = bench.timed(device, graph.launch, 16)
        graph.close()
        for address in tables:
            device.free(address)
        return f"{depth}: {us['median']:.0f} ({us['low']:.0f} to {us['high']:.0f})"

    for variant in ["as it is", *sys.argv[3:], "as it is"]:
        tiles = 0
        if ":" in variant:
            where, n = variant.split(":")
            tiles = int(n)
            folder = Path(tempfile.mkdtemp()) / "kernels"
            shutil.copytree(original, folder)
            patch(folder, where)
            compiler.KERNELS = folder
            compiler._sources_digest.cache_clear()
            device._functions.clear()
        print(variant, *(token_us(depth, tiles) for depth in depths), flush=True)


if __name__ == "__main__":
    main()
