# ruff: noqa
"""Where the blocks of a token's kernels are when: python bench/prototypes/phases.py llama-8b 0,16384

Patches a copy of the kernels so that thread 0 of each block notes the global timer at a few places, and prints, for
each kind of kernel, microseconds since the last block of the kernel before ended: mean over blocks and layers, and the last block's.
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
from headrace.cuda.device import DeviceArray
from common import Patch, graph_of, launches_at

N = 8
PLACES = {
    "matvec": ["entry", "go", "x there", "first tile", "tiles done", "sums there", "end"],
    "attend": ["entry", "go", "q there", "read", "warps met", "written", "arrived", "end"],
}


def patch(folder: Path) -> None:
    sub = Patch(folder)

    sub("primitives.cuh", ("#define BEGIN(a) dependency_wait(); Stopwatch stopwatch(a.stamps)", """
__shared__ u64* phase_place;
#define PHASE(i) if (threadIdx.x == 0) phase_place[i] = global_time()
#define PHASES(a) if (threadIdx.x == 0) phase_place = a.stamps + ((u64)(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 8; PHASE(0)
#define BEGIN(a) dependency_wait(); PHASE(1)"""),
        ("#else\n#define STAMPS\n", "#else\n#define PHASE(i)\n#define PHASES(a)\n#define STAMPS\n"))  # fmt: skip
    sub("matvec.cu",
        ("  Ring<STAGES, STAGE_BYTES> ring(", "  PHASES(a);\n  Ring<STAGES, STAGE_BYTES> ring("),
        ("  const X x = x_at<", "  PHASE(2);\n  const X x = x_at<"),
        ("      const float total = sum_transposed", "      if (t == 0) PHASE(3);\n      const float total = sum_transposed"),
        ("    sync_block();\n\n    auto result", "    PHASE(4);\n    sync_block();\n    PHASE(5);\n\n    auto result"),
        ("    if (unit + PASS_UNITS < last) sync_block();\n  }\n", "    if (unit + PASS_UNITS < last) sync_block();\n  }\n  PHASE(6);\n"))  # fmt: skip
    sub("attend.cu",
        ("  dependents_launch();\n", "  dependents_launch();\n  PHASES(args);\n"),
        ("    attend_split(a, now, query_at, split, shared, arrived, threadIdx.x, read, sync_block);\n",
         "    attend_split(a, now, query_at, split, shared, arrived, threadIdx.x, read, sync_block);\n    PHASE(7);\n"))  # fmt: skip
    sub("attend.cuh",
        ("  sync();\n  Warp w;", "  sync();\n  PHASE(2);\n  Warp w;"),
        ("  read(w, q);\n", "  read(w, q);\n  PHASE(3);\n"),
        ("  sync();\n  const Row out", "  sync();\n  PHASE(4);\n  const Row out"),
        ("  if (count == 1) return;\n  sync();\n", "  if (count == 1) return;\n  PHASE(5);\n  sync();\n"),
        ("  sync();\n  if (*is_last) {", "  sync();\n  PHASE(6);\n  if (*is_last) {"))  # fmt: skip


def main() -> None:
    folder = Path(tempfile.mkdtemp()) / "kernels"
    shutil.copytree(compiler.KERNELS, folder)
    patch(folder)
    compiler.KERNELS = folder
    import gpu as bench
    from headrace.cuda.gpu import CUDADevice
    from headrace.cuda.runner import CUDARunner, best_options

    decoder = bench.synthetic(sys.argv[1], "Q4_K_M", Path("/tmp"))
    device = CUDADevice()
    runner = CUDARunner(decoder, device, **best_options(device))
    depths = [int(d) for d in sys.argv[2].split(",")]
    runner.allocate_cache(max(depths) // PAGE_SIZE + 8)
    device.shared_limit -= 1024  # a static variable
    executor = runner.executor
    for depth in depths:
        plain = launches_at(executor, depth)
        launches, places, total = [], [], 0
        for launch in plain:
            blocks = int(np.prod(launch.grid)) if launch.spec.name in PLACES else 0
            places.append((launch, total, blocks))
            total += blocks * N
        address = device.allocate(total * 8, "phases")
        for launch, first, blocks in places:
            launches.append(
                launchers.timed(launch, address + 8 * first) if blocks else replace(launch)
            )
        graph = graph_of(device, launches)
        seen = []
        for _ in range(12):
            device.clear(address, total * 8)
            graph.launch()
            seen.append(
                device.download(DeviceArray(address, (total,), np.dtype(np.uint64))).astype(
                    np.int64
                )
            )
        kinds = {}
        for run in seen[2:]:
            previous = None
            for launch, first, blocks in places:
                if not blocks:
                    continue
                t = run[first : first + blocks * N].reshape(blocks, N)
                n = len(PLACES[launch.spec.name])
                ends = t[:, :n].max(axis=1)  # blocks that are not the last leave attention early
                if previous is not None:
                    macros = dict(launch.spec.macros)
                    kind = (
                        launch.spec.name,
                        macros.get("EPILOGUE", ""),
                        macros.get("K", ""),
                        macros.get("TYPE2", ""),
                        macros.get("TYPE0", ""),
                    )
                    times = np.where(t[:, :n] > 0, t[:, :n] - previous, 0) / 1e3
                    present = t[:, :n] > 0
                    mean = times.sum(0) / np.maximum(1, present.sum(0))
                    last = np.where(present, times, -1e9).max(0)
                    early = np.where(present, times, 1e9).min(0)
                    kinds.setdefault(kind, []).append(
                        (mean, early, last, (ends.max() - previous) / 1e3)
                    )
                previous = int(ends.max())
        print(
            f"{sys.argv[1]} depth {depth}: us since the kernel before ended; first block / mean / last block"
        )
        for kind, rows in kinds.items():
            mean, early, last = (np.mean([row[i] for row in rows], axis=0) for i in range(3))
            span = np.mean([row[3] for row in rows])
            text = "  ".join(
                f"{name} {e:.2f}/{m:.2f}/{l:.2f}"
                for name, e, m, l in zip(PLACES[kind[0]], early, mean, last)
            )
            print(f"{' '.join(kind):40} {span:6.2f}  {text}", flush=True)
        graph.close()
        device.free(address)


main()
