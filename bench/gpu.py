"""Decode speed on one GPU, beside the read ceiling measured in the same run.

    python bench/gpu.py --models llama-8b llama-1b --json results.json

Models are synthetic (random weights of a known shape, Q4_K_M): speed depends on shapes and types.
Every figure is a median with its spread (the quartiles); the receipt holds device, driver, clocks,
commit and command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from headrace.backend import PAGE_SIZE
from headrace.cuda import launchers
from headrace.cuda.decode import GreedyDecode
from headrace.cuda.device import Launch
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.launchers import Tuning
from headrace.cuda.lowering import Step
from headrace.cuda.runner import CUDARunner
from headrace.gguf.reader import open_gguf
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.synth import write_synthetic

REPEATS = 15


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "samples": len(samples),
    }


def timed(device: CUDADevice, work: Callable[[], None], inner: int = 1) -> dict[str, float]:
    """Microseconds of one ``work``, by device events around ``inner`` of them."""

    def many() -> None:
        for _ in range(inner):
            work()

    for _ in range(2):
        many()
    return summary([device.elapsed(many) * 1e6 / inner for _ in range(REPEATS)])


def read_ceiling(device: CUDADevice) -> dict[str, float]:
    """GB/s of a plain read kernel over 4 GB."""
    n_bytes = 4 << 30
    address = device.allocate(n_bytes, "read ceiling")
    launch = launchers.read(device, address, n_bytes, address)
    device.clear(address, n_bytes)
    microseconds = timed(device, lambda: device.launch(launch))
    device.free(address)
    return {"gb_per_s": n_bytes / microseconds["median"] / 1e3, **microseconds}


def smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def receipt(device: CUDADevice) -> dict[str, Any]:
    return {
        "device": device.name,
        "driver": smi("driver_version"),
        "clocks": smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def synthetic(shape: str, recipe: str, folder: Path) -> Decoder:
    path = folder / f"{shape}-{recipe}.gguf"
    if not path.exists():
        write_synthetic(path, shape, recipe)
    return load_decoder(open_gguf(path))


def weight_bytes(launch: Launch, runner: CUDARunner) -> int:
    """Bytes of weights a matvec launch reads, by the addresses it was given."""
    addresses = getattr(launch.arguments, "weights", ())
    sizes = runner.matrix_bytes()
    if isinstance(addresses, int):
        return 0
    return sum(sizes[address] for address in addresses if address)


def breakdown(runner: CUDARunner, depth: int) -> list[dict[str, Any]]:
    """Each kind of launch of one token, timed as a graph of all its occurrences in a row."""
    device = runner.device
    runner.set_row(1, depth, list(range(depth // PAGE_SIZE + 1)))
    step = Step(1, depth + 1, ((0, 1),))
    kinds: dict[str, list[Launch]] = {}
    for operation in runner.decoder.operations:
        for launch in runner.lowering.lower(operation, step):
            kinds.setdefault(f"{type(operation).__name__} {launch.spec.name}", []).append(launch)
    rows = []
    for kind, launches in kinds.items():
        repeated = launches * (-(-32 // len(launches)))  # long enough to time

        def record(batch: list[Launch] = repeated) -> None:
            for launch in batch:
                device.launch(launch)

        graph = device.capture(record)
        time_us = timed(device, graph.launch)["median"] / len(repeated)
        graph.close()
        n_bytes = sum(weight_bytes(launch, runner) for launch in launches) / len(launches)
        rows.append({"kind": kind, "count": len(launches), "us": time_us,
                     "gb_per_s": n_bytes / time_us / 1e3, "bytes": n_bytes})  # fmt: skip
    return rows


def decode(runner: CUDARunner, depth: int, count: int = 32) -> dict[str, Any]:
    """Decode after ``depth`` positions (whatever they hold): by events, and as the host sees it."""
    device = runner.device
    pages = list(range(-(-(depth + 4 * count + 64) // PAGE_SIZE)))
    loop = GreedyDecode(runner)
    loop.start(1, depth, pages)
    list(loop.tokens(8))  # captures

    def run() -> None:
        loop.start(1, depth, pages)
        for _ in loop.tokens(count):
            pass

    samples = [device.elapsed(run) * 1e6 / count for _ in range(REPEATS)]
    before = device.counters.synchronisations
    walls = []
    for _ in range(REPEATS):
        loop.start(1, depth, pages)
        start = time.perf_counter()
        for _ in loop.tokens(count):
            pass
        walls.append((time.perf_counter() - start) * 1e6 / count)
    blocking = device.counters.synchronisations - before
    loop.close()
    return {"depth": depth, "us": summary(samples), "wall_us": summary(walls),
            "tok_per_s": 1e6 / summary(walls)["median"],
            "blocking_synchronisations": blocking}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["llama-8b", "llama-1b"])
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--depths", nargs="*", type=int, default=[0, 4096, 16384])
    parser.add_argument("--tunings", nargs="*", default=["16,2,1"], help="warps,stages,exclusive")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-breakdown", action="store_true")
    options = parser.parse_args()

    device = CUDADevice()
    result = receipt(device) | {"read_ceiling": read_ceiling(device), "models": []}
    ceiling = result["read_ceiling"]["gb_per_s"]
    print(f"{device.name}: read ceiling {ceiling:,.0f} GB/s", flush=True)
    for name in options.models:
        start = time.perf_counter()
        decoder = synthetic(name, options.recipe, options.folder)
        print(f"{name}: made in {time.perf_counter() - start:.1f} s", flush=True)
        for text in options.tunings:
            warps, stages, exclusive = (int(part) for part in text.split(","))
            tuning = Tuning(warps, stages, bool(exclusive))
            start = time.perf_counter()
            runner = CUDARunner(decoder, CUDADevice(), max_rows=8, tuning=tuning)
            load = time.perf_counter() - start
            runner.allocate_cache(max(options.depths) // PAGE_SIZE + 8)
            first = decode(runner, options.depths[0])
            total = sum(
                weight_bytes(launch, runner)
                for launch in runner.lowering.launches(Step(1, 64, ((0, 1),)))
            )
            decodes = [first, *(decode(runner, depth) for depth in options.depths[1:])]
            for d in decodes:
                rate = total / d["us"]["median"] / 1e3
                d["share_of_ceiling"] = rate / ceiling
                us = d["us"]
                print(f"{name} {text} depth {d['depth']}: {d['tok_per_s']:.0f} tok/s "
                      f"({us['median']:.0f} us by events, {us['low']:.0f} to {us['high']:.0f}), "
                      f"{rate:,.0f} GB/s of weights = {rate / ceiling:.1%}",
                      flush=True)  # fmt: skip
            parts = [] if options.no_breakdown else breakdown(runner, options.depths[0])
            for part in parts:
                print(f"  {part['kind']:28} x{part['count']:3} {part['us']:8.2f} us "
                      f"{part['gb_per_s']:7,.0f} GB/s = {part['gb_per_s'] / ceiling:.1%}",
                      flush=True)  # fmt: skip
            alone = sum(part["us"] * part["count"] for part in parts)
            print(f"  sum of parts {alone:.0f} us", flush=True)
            result["models"].append({"model": name, "recipe": options.recipe, "tuning": text,
                                     "weight_bytes": total, "load_s": load, "decode": decodes,
                                     "breakdown": parts})  # fmt: skip
            runner.close()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
