"""Search for the constants of the kernels that are best on this GPU (docs/decisions/018).

    python bench/tune.py --json receipt.json --update

Coordinate descent over a few candidates for each constant of ``headrace.cuda.tuning.Tuning``. A
candidate is judged by the figures whose launches it changes: decoding at three depths, steps of
several sequences, a prompt, as ``gpu.py`` times them. Each is timed between two timings of the
baseline; it wins if it is better by more than the spread, and makes no figure worse by over 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from descent import WORSE, Figure, Measured, Search, descend, line
from gpu import (
    decoding,
    host_samples,
    prompt,
    read_ceiling,
    receipt,
    row_graph,
    row_step,
    samples_of,
    synthetic,
)

from headrace.backend import PAGE_SIZE
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, Launch
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
from headrace.cuda.steps import Step
from headrace.cuda.tuning import TUNED, Tuning, read_records, tuning_for
from headrace.cuda.weights import WeightIndex
from headrace.model.decoder import Decoder

CANDIDATES: dict[str, Sequence[Any]] = {
    "attend_warps": (4, 8),
    "attend_split": (128, 256, 512),
    "matvec_warps": (12, 16, 24),
    "matvec_stages": (2, 3, 4),
    "matvec_early": (0, 1, 2),
    "matvec_exclusive": (False, True),
    "few_first": (2, 3, 4),
    "few_last": (8, 12, 16),
    "skinny_warps": (8, 16),
    "skinny_ahead": (0, 16, 32, 48),
    "gemm_fill": (0.5, 1.3, 1.6, 2.0),
    "gemm_unpack": (32, 48, 64, 96),
    "tensor_rows": (4, 8, 16),
    "prompt_rows": (1024, 1536, 2048),  # more are not slower, but who generates waits for them
}
SIZES = {"decode": (0, 4096, 16384), "rows": (2, 3, 4, 8, 12, 16, 32), "prompt": (4096,)}
"""2, 3 and 12 sequences are there for ``few_first`` and ``few_last``."""
TOKENS = 16
"""Of a burst that is timed."""
_INNER = 4
"""Steps of several sequences that are timed together."""


class DeviceBench:
    """See :class:`descent.Bench`: weights are loaded once; a baseline and a candidate, each with
    workspace and cache of its own, take turns over them."""

    def __init__(self, device: Device, decoders: Mapping[str, Decoder], deepest: int) -> None:
        self._device, self._decoders = device, decoders
        self._n_pages = deepest // PAGE_SIZE + 8
        self._weights: dict[str, WeightIndex] = {}
        self._runners: dict[tuple[str, Tuning, bool], CUDARunner] = {}
        self._specs: dict[Specialisation, Specialisation] = {}
        self._launches: dict[tuple[Tuning, Figure], tuple[Hashable, ...]] = {}
        for name, decoder in decoders.items():
            index = WeightIndex(decoder)
            index.load(device)
            self._weights[name] = index

    def plan(self, tuning: Tuning, figure: Figure) -> Hashable:
        key = tuning, figure
        if key not in self._launches:
            intern = self._specs.setdefault  # most are the same in all plans
            self._launches[key] = tuple(
                (intern(x.spec, x.spec), x.grid, x.threads, x.shared_bytes)
                for x in launches_of(self._runner(figure.model, tuning), figure)
            )
        return self._launches[key]

    def prepare(self, work: Sequence[tuple[Tuning, Figure]]) -> None:
        runners = ((self._runner(figure.model, tuning), figure) for tuning, figure in work)
        specs = {launch.spec: None for how in runners for launch in launches_of(*how)}
        self._device.prepare(specs)

    def samples(self, tuning: Tuning, figure: Figure, *, again: bool = False) -> list[float]:
        runner, device = self._runner(figure.model, tuning, again), self._device
        if figure.kind == "decode":
            burst = decoding(runner, figure.size, TOKENS)
            return [us / TOKENS for us in samples_of(device, burst)]
        if figure.kind == "prompt":
            return host_samples(prompt(runner, figure.size))
        graph = row_graph(runner, figure.size)
        try:
            return samples_of(device, graph.launch, _INNER)
        finally:
            graph.close()

    def _runner(self, model: str, tuning: Tuning, again: bool = False) -> CUDARunner:
        key = model, tuning, again
        runner = self._runners.pop(key, None)
        if runner is None:
            of_model = [one for one in self._runners if one[0] == model]
            for old in of_model[:-1]:  # the last used stays beside the new one
                self._runners.pop(old).close()
            runner = CUDARunner(
                self._decoders[model], self._device, weights=self._weights[model], tuning=tuning,
                **best_options(self._device, tuning=tuning),
            )  # fmt: skip
            try:
                runner.allocate_cache(self._n_pages)
            except BaseException:
                runner.close()
                raise
        self._runners[key] = runner  # as the last used
        return runner

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()
        for index in self._weights.values():
            index.close(self._device)
        self._device.close()


def launches_of(runner: CUDARunner, figure: Figure) -> list[Launch]:
    """What it launches but for the choice, which no constant changes."""
    lowering, size = runner.executor.lowering, figure.size
    if figure.kind == "decode":
        longest = max(PAGE_SIZE, 1 << (size + TOKENS - 1).bit_length())
        return lowering.launches(Step(1, longest, ((0, 1),)))
    if figure.kind == "rows":
        return lowering.launches(row_step(size))
    made, at_once = [], lowering.prompt_rows or lowering.max_rows
    for first in range(0, size, at_once):
        n = min(at_once, size - first)
        wanted = ((n - 1, 1),) if first + n == size else ()
        longest = 1 << (first + n - 1).bit_length()
        made += lowering.launches(Step(n, longest, wanted, lowering.prompt_rows > 0))
    return made


def written(one: Measured) -> dict[str, Any]:
    """For the receipt."""
    samples = {"before": one.before, "candidate": one.candidate, "after": one.after}
    us = {name: [round(t, 1) for t in times] for name, times in samples.items()}
    return {**one.figure._asdict(), "us": us, "gain": one.gain, "spread": one.spread}


def report(search: Search, start: Tuning) -> dict[str, Any]:
    return {
        "seconds": search.seconds,
        "start": asdict(start),
        "constants": asdict(search.tuning),
        "searched": search.searched,
        "left_out": {str(figure): why for figure, why in search.left_out.items()},
        "control": [written(one) for one in search.control.values()],
        "trials": [
            {"constant": one.constant, "value": one.value, "against": one.against,
             "verdict": one.verdict, "measured": [written(m) for m in one.measured]}
            for one in search.trials
        ],
    }  # fmt: skip


def update(path: Path, search: Search, found: Mapping[str, Any]) -> None:
    """Write the device's record into the records, those of the package if there are none yet."""
    records = json.loads((path if path.exists() else TUNED).read_text())
    records[found["device"]] = {
        "constants": asdict(search.tuning),
        "date": found["time"][:10],
        "commit": found["commit"],
        "command": found["command"],
        "searched": search.searched,
    }
    path.write_text(json.dumps(records, indent=1) + "\n")
    read_records(path)


def print_table(search: Search, start: Tuning) -> None:
    print(f"\n{'constant':16} {'':6}    {'':6} {'mean':>7} {'best':>7}")
    for trial in search.trials:
        print(line(trial))
    noise = max((abs(one.gain) for one in search.control.values()), default=0.0)
    print(f"the same twice differs by up to {noise:.2%}; {search.seconds:.0f} s")
    changed = [name for name in CANDIDATES if getattr(start, name) != getattr(search.tuning, name)]
    for name in changed:
        print(f"{name} = {getattr(search.tuning, name)}, not {getattr(start, name)}")
    if not changed:
        print("nothing is better than what was there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-8b", "llama-1b"])
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="CONSTANT",
                        default=list(CANDIDATES), help=", ".join(CANDIDATES))  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=240, help="of the search, loading included"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--commit", help="for the receipt, where git cannot tell")
    parser.add_argument("--json", type=Path, help="every measurement")
    parser.add_argument("--update", type=Path, nargs="?", const=TUNED, metavar="FILE",
                        help="write the record into FILE (default: the package's)")  # fmt: skip
    options = parser.parse_args()

    decoders = {name: synthetic(name, options.recipe, options.folder) for name in options.models}
    begin, device = time.monotonic(), CUDADevice()
    start = tuning_for(device)
    found = receipt(device, options.commit) | {"read_ceiling": read_ceiling(device)}
    figures = [
        Figure(name, kind, size)
        for kind, sizes in SIZES.items()
        for name in options.models
        for size in sizes
    ]
    bench = DeviceBench(device, decoders, max(max(sizes) for sizes in SIZES.values()))
    candidates = {name: CANDIDATES[name] for name in CANDIDATES if name in options.only}
    print(
        f"{device.name}: loaded in {time.monotonic() - begin:.1f} s; a figure may lose {WORSE:.1%}"
    )
    left = options.seconds - (time.monotonic() - begin)
    search = descend(bench, start, candidates, figures, seconds=left)
    bench.close()
    print_table(search, start)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found | report(search, start)) + "\n")
    if options.update and search.searched:
        update(options.update, search, found)
    elif options.update:
        raise SystemExit("no constant was searched to its end: the records are as they were")


if __name__ == "__main__":
    main()
