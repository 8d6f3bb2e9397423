"""What the profiler costs a CPU step: its code when it is off, and the time stamps when it is on.

    python bench/profile_cost.py smollm2

One runner makes tokens with three steps in turn: compiled without any of the profiler's code, as it
is, and with time stamps. Ratios are of neighbours.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from llvmlite import binding as llvm

from headrace import hub
from headrace.backend import Batch
from headrace.cpu import compile as compiling
from headrace.cpu.runner import CPURunner
from headrace.cpu.team import Team
from headrace.gguf import open_gguf
from headrace.model import load_decoder

VARIANTS = ("without its code", "off", "on")
PAGES = 8


def write_bare_step(path: Path) -> None:
    """The object code of the step, as it would be without a profiler. Once a process."""
    from headrace.cpu import ahead_of_time, step
    from headrace.cpu.ops import compiled

    barrier = step.barrier

    @compiled
    def end_phase(shared, n_threads, stamps, phase):  # type: ignore[no-untyped-def]
        barrier(shared, n_threads)
        return phase

    @compiled
    def stamp(stamps, phase, which):  # type: ignore[no-untyped-def]
        pass

    step._end_phase, step._stamp = end_phase, stamp
    assembly = ahead_of_time.step_assembly()
    path.write_bytes(compiling.emit_object(assembly, compiling.host_target(), ["take_part"]))


class SwitchedRunner(CPURunner):
    """Takes the step as it is, or the one of ``code``, when its threads next wake."""

    def __init__(self, path: Path, threads: int | None, code: bytes) -> None:
        super().__init__(load_decoder(open_gguf(path)), threads)
        machine = compiling.host_target().machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._as_it_is = self._take_part
        self._bare = type(self._take_part)(self._engine.get_function_address("take_part"))

    def switch(self, bare: bool) -> None:
        time.sleep(0.003)  # the threads spin inside the last step for a while, then leave it
        self._take_part = self._bare if bare else self._as_it_is

    def _started_team(self) -> Team:
        if self._team is None:
            context = self._context.ctypes.data

            def serve(member: int, shared: int, ticket: int) -> int:
                return self._take_part(member, self._n_threads, shared, ticket, context)

            self._team = Team(self._n_threads, serve)
        return self._team


def batch(position: int) -> Batch:
    token = np.array([7919 * position % 1000], np.int32)
    table = np.arange(PAGES, dtype=np.int32)[None, :]
    return Batch(token, np.array([position], np.int32), np.zeros(1, np.int32), table,
                 np.zeros(1, np.int32))  # fmt: skip


def measure(path: Path, threads: int | None, tokens: int) -> dict[str, list[float]]:
    """Seconds of each token, by variant."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "step.o"
        subprocess.run([sys.executable, __file__, "--write-bare-step", str(bare)], check=True)
        code = bare.read_bytes()
    runner = SwitchedRunner(path, threads, code)
    runner.allocate_cache(PAGES)
    instrument = runner.instrument()
    steps = (instrument.plain_step, instrument.plain_step, instrument.timed_step)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(tokens):
        turns = list(zip(VARIANTS, steps, strict=True))
        random.shuffle(turns)
        for name, step in turns:
            runner.switch(bare=name == VARIANTS[0])
            step(batch(i % 64))  # wakes the threads
            start = time.perf_counter()
            step(batch(i % 64))
            seconds[name].append(time.perf_counter() - start)
    runner.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a path or a name headrace knows")
    parser.add_argument("--threads", "-t", type=int)
    parser.add_argument("--tokens", "-n", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seconds = measure(hub.resolve(arguments.model), arguments.threads, arguments.tokens)
    bare = np.array(seconds[VARIANTS[0]])
    facts = []
    for name in VARIANTS:
        ratios = np.array(seconds[name]) / bare
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        median = float(np.median(seconds[name]))
        facts.append(
            {"variant": name, "seconds": median, "ratio": middle, "quartiles": [low, high]}
        )
    if arguments.json:
        print(json.dumps({"model": arguments.model, "variants": facts}))
        return
    for fact in facts:
        low, high = fact["quartiles"]
        print(f"{fact['variant']:16} {fact['seconds'] * 1e3:.3f} ms  x {fact['ratio']:.4f} "
              f"(quartiles {low:.3f} to {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-bare-step"]:
        write_bare_step(Path(sys.argv[2]))
    else:
        main()
