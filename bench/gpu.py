"""Decode speed on one GPU, beside the read ceiling measured in the same run.

    python bench/gpu.py --models llama-8b llama-1b --json results.json

Models are synthetic (random weights of a known shape, Q4_K_M): speed depends on shapes and types.
Besides decode at several depths: where a token's time goes by kernel, steps of many sequences, and
prompts. Every figure is a median with its spread (the quartiles); the receipt holds device, driver,
clocks, commit and command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.backend import CACHED_BYTES, PAGE_SIZE, Batch, DecodeRow
from headrace.cuda import launchers
from headrace.cuda.device import Device, Graph, Launch
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import MAX_ROWS, CUDARunner, best_options
from headrace.cuda.steps import Step
from headrace.cuda.tuning import ALLOWED, DEFAULTS, tuning_for
from headrace.gguf.reader import open_gguf
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.sampling import SamplingParams
from headrace.synth import write_synthetic

REPEATS = 10


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "samples": len(samples),
    }


def samples_of(device: Device, work: Callable[[], None], inner: int = 1) -> list[float]:
    """Microseconds of one ``work``, by device events around ``inner`` of them."""

    def many() -> None:
        for _ in range(inner):
            work()

    for _ in range(2):
        many()
    return [device.elapsed(many) * 1e6 / inner for _ in range(REPEATS)]


def timed(device: Device, work: Callable[[], None], inner: int = 1) -> dict[str, float]:
    return summary(samples_of(device, work, inner))


def read_ceiling(device: Device, n_bytes: int = 4 << 30) -> dict[str, float]:
    """GB/s of a plain read kernel over 4 GB."""
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


def receipt(device: CUDADevice, given: str | None) -> dict[str, Any]:
    return {
        "device": device.name,
        "driver": smi("driver_version"),
        "clocks": smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"),
        "commit": given or commit(),
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
    sizes = runner.executor.weights.matrix_bytes()
    if isinstance(addresses, int):
        return 0
    return sum(sizes[address] for address in addresses if address)


def weight_count(launch: Launch) -> int:
    """Weights that each row of a launch meets; 0 where it multiplies by no matrix."""
    macros = dict(launch.spec.macros)
    if "N0" not in macros:
        return 0
    return int(macros["K"]) * sum(int(macros[f"N{i}"]) for i in range(3))


def print_parts(parts: list[dict[str, Any]], ceiling: float) -> None:
    for part in parts:
        print(
            f"  {part['kind']:28} x{part['count']:3} {part['us']:8.2f} us "
            f"{part['gb_per_s']:7,.0f} GB/s = {part['gb_per_s'] / ceiling:.1%} "
            f"{part['tflops']:6.1f} TFLOP/s",
            flush=True,
        )
    print(f"  sum of parts {sum(part['us'] * part['count'] for part in parts):.0f} us", flush=True)


def breakdown(runner: CUDARunner, first: int, n: int = 1) -> list[dict[str, Any]]:
    """Each kind of launch of a step of ``n`` tokens from position ``first`` on, timed as a graph of
    all its occurrences in a row."""
    executor = runner.executor
    device = executor.device
    positions = np.arange(first, first + n, dtype=np.int32)
    pages = np.arange(int(positions[-1]) // PAGE_SIZE + 1, dtype=np.int32)[None]
    executor.bring(Batch(positions % 100, positions, positions * 0, pages, positions[-1:] - first))
    prompt = n > 1 and executor.lowering.prompt_rows > 0
    step = Step(n, int(positions[-1]) + 1, ((n - 1, 1),), prompt)
    kinds: dict[str, list[Launch]] = {}
    for operation in runner.decoder.operations:
        for launch in executor.lowering.lower(operation, step):
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
        weights = sum(weight_count(launch) for launch in launches) / len(launches)
        rows.append({"kind": kind, "count": len(launches), "us": time_us,
                     "gb_per_s": n_bytes / time_us / 1e3, "bytes": n_bytes,
                     "tflops": 2 * n * weights / time_us / 1e6})  # fmt: skip
    return rows


MODES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "dots": {},
    "tensor": {"tensor_rows": 1, "prompt_rows": DEFAULTS.prompt_rows},
    "one-kernel": {"tensor_rows": 8, "one_kernel": True, "prompt_rows": DEFAULTS.prompt_rows},
}
"""Options of the runner: the best for the device; integer dots alone; tensor cores alone; and what
is not on by default (docs/decisions/017)."""

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "llama.cpp's defaults": SamplingParams(),
    "all of the vocabulary": SamplingParams(top_k=0, top_p=1.0, min_p=0.0),
    "top_p alone": SamplingParams(top_k=0, top_p=0.95, min_p=0.0),
}


def decoding(runner: CUDARunner, depth: int, count: int, how: str = "greedy") -> Callable[[], None]:
    """A burst of ``count`` tokens after ``depth`` positions (whatever they hold)."""
    pages = list(range(-(-(depth + count + 64) // PAGE_SIZE)))
    row = DecodeRow([1] * (depth + 1), pages, 1, SAMPLINGS[how], 0)

    def run() -> None:
        for _ in runner.decode([row], count):
            pass

    return run


def decode(runner: CUDARunner, depth: int, count: int = 32, how: str = "greedy") -> dict[str, Any]:
    """Decode after ``depth`` positions: by events, and as the host sees it."""
    device, run = runner.executor.device, decoding(runner, depth, count, how)
    run()  # captures
    samples = [device.elapsed(run) * 1e6 / count for _ in range(REPEATS)]
    counters = device.counters
    before = counters.synchronisations, counters.graph_launches
    walls = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        walls.append((time.perf_counter() - start) * 1e6 / count)
    tokens = REPEATS * count
    return {"depth": depth, "sampling": how, "us": summary(samples), "wall_us": summary(walls),
            "tok_per_s": 1e6 / summary(walls)["median"],
            "blocking_synchronisations": counters.synchronisations - before[0],
            "graph_launches_per_token": (counters.graph_launches - before[1]) / tokens}  # fmt: skip


def row_step(n: int) -> Step:
    return Step(n, PAGE_SIZE, ((0, n),))


def row_graph(runner: CUDARunner, n: int) -> Graph:
    """A step of ``n`` rows, each the first token of a sequence of its own. Its rows are the
    runner's until others are brought."""
    device = runner.executor.device
    zeros, ones = np.zeros(n, np.int32), np.ones(n, np.int32)
    table = np.arange(n, dtype=np.int32)[:, None]
    runner.executor.bring(Batch(ones, zeros, np.arange(n, dtype=np.int32), table, zeros[:1]))
    launches = runner.executor.lowering.launches(row_step(n))
    device.prepare(launch.spec for launch in launches)

    def record() -> None:
        for launch in launches:
            device.launch(launch)

    return device.capture(record)


def row_curve(runner: CUDARunner, counts: list[int]) -> list[dict[str, Any]]:
    device, curve = runner.executor.device, []
    for n in counts:
        graph = row_graph(runner, n)
        times = timed(device, graph.launch)
        graph.close()
        curve.append({"rows": n, "tok_per_s": n * 1e6 / times["median"], "us": times})
    return curve


def prompt(runner: CUDARunner, n_tokens: int) -> Callable[[], object]:
    """A prompt of one sequence through ``step``, logits of the last row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, runner.decoder.config.n_vocab, n_tokens, dtype=np.int32)
    positions = np.arange(n_tokens, dtype=np.int32)
    table = np.arange(-(-n_tokens // PAGE_SIZE), dtype=np.int32)[None]
    batch = Batch(tokens, positions, np.zeros_like(positions), table, positions[-1:])
    return lambda: runner.step(batch)


def host_samples(work: Callable[[], object]) -> list[float]:
    """Microseconds of ``work`` as the host sees it."""
    work()
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


def prefill(runner: CUDARunner, n_tokens: int) -> dict[str, Any]:
    times = summary(host_samples(prompt(runner, n_tokens)))
    return {"tokens": n_tokens, "tok_per_s": n_tokens * 1e6 / times["median"], "us": times}


def measure(
    decoder: Decoder, name: str, mode: str, cache_type: str, ceiling: float,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    start = time.perf_counter()
    gpu = CUDADevice()
    tuning = replace(tuning_for(gpu), **dict(options.tuning))
    how = best_options(gpu, tuning=tuning) if MODES[mode] is None else MODES[mode]
    runner = CUDARunner(
        decoder, gpu, max_rows=max(MAX_ROWS, *options.rows), tuning=tuning,
        cache_type=cache_type, **how,
    )  # fmt: skip
    load = time.perf_counter() - start
    runner.allocate_cache(max(*options.depths, 4096) // PAGE_SIZE + 8)
    launches = runner.executor.lowering.launches(Step(1, 64, ((0, 1),)))
    total = sum(weight_bytes(launch, runner) for launch in launches)
    decodes = [decode(runner, depth) for depth in options.depths]
    decodes += [decode(runner, options.depths[0], how=how) for how in list(SAMPLINGS)[1:]]
    for d in decodes:
        us, rate = d["us"], total / d["us"]["median"] / 1e3
        d["share_of_ceiling"] = rate / ceiling
        print(
            f"{name} ({mode}, {cache_type}) depth {d['depth']}, {d['sampling']}: "
            f"{d['tok_per_s']:.0f} tok/s ({us['median']:.0f} us, "
            f"{us['low']:.0f} to {us['high']:.0f}), {rate:,.0f} GB/s of weights = "
            f"{rate / ceiling:.1%} of the ceiling",
            flush=True,
        )
    parts = breakdown(runner, options.depths[0])
    print_parts(parts, ceiling)
    curve = row_curve(runner, options.rows)
    prompts = [prefill(runner, n) for n in options.prompts]
    for one in curve:
        print(f"  {one['rows']:3} sequences: {one['tok_per_s']:.0f} tok/s in all", flush=True)
    for one in prompts:
        print(f"  prompt of {one['tokens']}: {one['tok_per_s']:.0f} tok/s", flush=True)
    step = min(options.prompts[-1], runner.executor.lowering.most_rows)
    of_prompt = breakdown(runner, 0, step)
    print(f"  {step} tokens of a prompt:", flush=True)
    print_parts(of_prompt, ceiling)
    runner.close()
    return {
        "model": name,
        "products": mode,
        "cache_type": cache_type,
        "recipe": options.recipe,
        "tuning": asdict(tuning),
        "weight_bytes": total,
        "load_s": load,
        "decode": decodes,
        "breakdown": parts,
        "rows": curve,
        "prefill": prompts,
        "prompt_breakdown": of_prompt,
    }


def constant(text: str) -> tuple[str, Any]:
    """``matvec_warps=8`` as (name, value)."""
    name, _, value = text.partition("=")
    if name not in ALLOWED:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ALLOWED)}")
    for one in ALLOWED[name]:
        if str(one).lower() == value.lower():
            return name, one
    raise argparse.ArgumentTypeError(f"{name} is one of {', '.join(map(str, ALLOWED[name]))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["llama-8b", "llama-1b"])
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--products", nargs="*", choices=MODES, default=["default"])
    parser.add_argument("--cache-type", nargs="*", choices=CACHED_BYTES, default=["f16"])
    parser.add_argument("--depths", nargs="*", type=int, default=[0, 4096, 16384])
    parser.add_argument(
        "--rows", nargs="*", type=int, default=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256]
    )
    parser.add_argument("--prompts", nargs="*", type=int, default=[128, 512, 4096])
    parser.add_argument(
        "--tuning", nargs="*", type=constant, default=[], metavar="NAME=VALUE",
        help="constants of headrace.cuda.tuning.Tuning other than the device's",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--commit", help="for the receipt, where git cannot tell")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    device = CUDADevice()
    result = receipt(device, options.commit) | {"read_ceiling": read_ceiling(device), "models": []}
    ceiling = result["read_ceiling"]["gb_per_s"]
    print(f"{device.name}: read ceiling {ceiling:,.0f} GB/s", flush=True)
    for name in options.models:
        decoder = synthetic(name, options.recipe, options.folder)
        for mode, kept in itertools.product(options.products, options.cache_type):
            result["models"].append(measure(decoder, name, mode, kept, ceiling, options))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
