# ruff: noqa
"""Attention's splits as one cluster of blocks: python bench/prototypes/clusters.py llama-8b 0,1000,4096,16384

Patches a copy of the kernels: the blocks of a kv head's splits meet at the cluster's barrier and join through each other's
shared memory, each an equal part of the dims, instead of through device memory and the last block. Prints microseconds a
token (a graph without the choice) as it is and so, whether the logits are bit-equal, and how many clusters fit at once.
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
from headrace.cuda import launchers
from headrace.cuda.gpu import CUDADevice, _check
from common import Patch, graph_of, launches_at

EXTRA = 8192


def patch(folder: Path) -> None:
    sub = Patch(folder)

    sub(
        "primitives.cuh",
        (
            "#define BEGIN(a) dependency_wait(); Stopwatch stopwatch(a.stamps)",
            """
DEVICE void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE float load_cluster(const float* p, int rank) {
  u32 at; float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
#define BEGIN(a) dependency_wait()""",
        ),
    )
    sub(
        "attend.cu",
        (
            "    attend_split(a, now, split, shared, arrived, threadIdx.x, read, sync_block);\n  }\n",
            "    attend_split(a, now, split, shared, arrived, threadIdx.x, read, sync_block);\n  }\n"
            "#if TIMED\n  if (gridDim.y > 1) { if (first_split > last) cluster_sync(); cluster_sync(); }\n#endif\n",
        ),
    )
    sub(
        "attend.cuh",
        (
            "  for (int i = thread; i < heads * CACHE_DIM; i += ATTEND_WARPS * 32) {\n    const int head = i / CACHE_DIM, dim = i % CACHE_DIM;\n    float largest",
            """#if TIMED
  float* const joined = (float*)(shared + (ATTEND_BYTES + 15) / 16 * 16);  // [MOST_HEADS, CACHE_DIM]
  float* const joined_max = joined + MOST_HEADS * CACHE_DIM;               // [MOST_HEADS, 2]
#endif
  for (int i = thread; i < heads * CACHE_DIM; i += ATTEND_WARPS * 32) {
    const int head = i / CACHE_DIM, dim = i % CACHE_DIM;
    float largest""",
        ),
        (
            "    else {\n      const u64 at",
            """    else {
#if TIMED
      joined[i] = v;
      if (dim == 0) joined_max[2 * head] = largest, joined_max[2 * head + 1] = sum;
      continue;
#endif
      const u64 at""",
        ),
        (
            "  if (count == 1) return;\n  sync();\n",
            """#if TIMED
  if (gridDim.y > 1) {
    cluster_sync();
    if (count == 1) return;
    for (int chunk = blockIdx.y + gridDim.y * warp; chunk * 32 < heads * CACHE_DIM; chunk += gridDim.y * ATTEND_WARPS) {
      const int i = 32 * chunk + lane, head = i / CACHE_DIM;
      float2 m = make_float2(-INFINITY, 0.f);
      if (lane < count) m = make_float2(load_cluster(joined_max + 2 * head, lane), load_cluster(joined_max + 2 * head + 1, lane));
      float x[16];
#pragma unroll
      for (int s = 0; s < 16; ++s) x[s] = s < count ? load_cluster(joined + i, s) : 0.f;
      float most = m.x;
#pragma unroll
      for (int step = 16; step; step >>= 1) most = fmaxf(most, shuffle_xor(most, step));
      m.x = exp2_near(m.x - most);
      const float all = warp_sum(fmaf(m.y, m.x, 0.f)), weight = m.x / all;
      float v = 0.f;
#pragma unroll
      for (int s = 0; s < 16; ++s)
        if (s < count) v = fmaf(x[s], shuffle(weight, s), v);
      finish(head, i % CACHE_DIM, v);
    }
    return;
  }
#endif
  if (count == 1) return;
  sync();
""",
        ),
    )


class Device(CUDADevice):
    def _prepare_launch(self, launch):
        prepared = super()._prepare_launch(launch)
        if (
            launch.spec.name == "attend"
            and dict(launch.spec.macros).get("TIMED")
            and launch.grid[1] > 1
        ):
            _, function, config, _ = prepared
            driver = self.driver
            kinds = driver.CUlaunchAttributeID
            cluster = driver.CUlaunchAttribute()
            cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = (
                1,
                launch.grid[1],
                1,
            )
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _check(driver.cuFuncSetAttribute(function, limit, 1), "cluster size")
            early = driver.CUlaunchAttribute()
            early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [early, cluster], 2
            self.keep.append((early, cluster))
            if launch.grid[1] not in self.told:
                self.told.add(launch.grid[1])
                print(
                    "clusters of",
                    launch.grid[1],
                    "at once:",
                    driver.cuOccupancyMaxActiveClusters(function, config),
                )
        return prepared

    told: set = set()
    keep: list = []


def main() -> None:
    original = compiler.KERNELS
    import gpu as bench
    from headrace.cuda.runner import CUDARunner, best_options

    decoder = bench.synthetic(sys.argv[1], "Q4_K_M", Path("/tmp"))
    device = Device()
    runner = CUDARunner(decoder, device, **best_options(device))
    depths = [int(d) for d in sys.argv[2].split(",")]
    runner.allocate_cache(max(depths) // PAGE_SIZE + 8)
    executor = runner.executor
    folder = Path(tempfile.mkdtemp()) / "kernels"
    shutil.copytree(original, folder)
    patch(folder)
    if max(depths) >= 64:  # something to attend to
        tokens = np.arange(max(depths)) * 7 % 1000
        for first in range(0, max(depths), 2048):
            at = np.arange(first, min(first + 2048, max(depths)), dtype=np.int32)
            pages = np.arange(max(depths) // PAGE_SIZE + 1, dtype=np.int32)[None]
            runner.step(Batch(tokens[at].astype(np.int32), at, at * 0, pages, at[:0]))

    def token(depth: int, clusters: bool):
        launches = []
        for launch in launches_at(executor, depth):
            if clusters and launch.spec.name == "attend":
                launch = replace(
                    launchers.timed(launch, 0), shared_bytes=launch.shared_bytes + EXTRA
                )
            launches.append(replace(launch))
        graph = graph_of(device, launches)
        us = bench.timed(device, graph.launch, 16)
        logits = device.download(executor.lowering.arena["logits"])[0]
        graph.close()
        return us, logits

    results = {}
    for clusters in (False, True, False):
        compiler.KERNELS = folder if clusters else original
        compiler._sources_digest.cache_clear()
        device._functions.clear()
        for depth in depths:
            us, logits = token(depth, clusters)
            equal = np.array_equal(results.setdefault(depth, logits), logits)
            print(
                "clusters" if clusters else "as it is",
                depth,
                f"{us['median']:.0f} ({us['low']:.0f} to {us['high']:.0f})",
                "bit-equal" if equal else "DIFFERENT",
                flush=True,
            )


if __name__ == "__main__":
    main()
