"""How long a person waits: from the start of ``headrace run`` to the first byte of the answer.

    python bench/first_token.py smollm2
    python bench/first_token.py llama-8b.gguf --device cuda

    python bench/first_token.py llama-8b.gguf --device cuda --stages

Runs the program five times as it is found compiled, then once with an empty cache, as on the day it
is installed. Beside it: how long the file takes to be read, from the page cache, by one thread into
one buffer. Both the program's whole wait is told, and that from its call of ``headrace.load`` on,
with what that imports. Peak memory is the largest resident set that the system saw, pages of the
weights that are mapped included. --stages shows what the last of the five waits consisted of, and
what ran beside what.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from headrace import hub

PROMPT = "Explain gravity in one sentence."


def raw_read(path: Path) -> float:
    """Seconds to read all of the file."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


_TRACED = """
import logging, sys
from headrace.serve.logs import JSONLines
handler = logging.FileHandler(sys.argv.pop(1))
handler.setFormatter(JSONLines())
logger = logging.getLogger("headrace.stages")
logger.addHandler(handler)
logger.setLevel("DEBUG")
from headrace.cli import main
main()
"""


@dataclass(frozen=True)
class Wait:
    """Of one run: seconds to the first byte on stdout, and the stages that ended before it, in the
    order they began in: ``event``, and from the start of the program ``begin`` and ``end``,
    seconds; ``bytes`` of those that pass over many."""

    seconds: float
    stages: list[dict[str, Any]]

    @property
    def from_load(self) -> float:
        return self.seconds - min(one["begin"] for one in self.stages if one["event"] == "load")


def first_token(path: Path, device: str, cache: Path) -> Wait:
    """Of a program whose kernels are in ``cache``."""
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, "-c", _TRACED, log.name, "run", str(path), PROMPT, "-n", "32"]
        command += ["--device", device]
        begin, start = time.time(), time.perf_counter()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HEADRACE_CACHE": str(cache)},
        ) as process:
            assert process.stdout is not None
            arrived = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if not arrived or process.returncode:
            sys.exit(f"headrace run ended with status {process.returncode}")
        records = [json.loads(line) for line in log.read().splitlines()]
    found = []
    for record in records:
        end = datetime.fromisoformat(record.pop("time")).timestamp() - begin
        if end < seconds:
            found.append(record | {"begin": end - record.pop("seconds"), "end": end})
    found.sort(key=lambda one: one["begin"])
    loaded = max(one["end"] for one in found if one["event"] == "load")
    return Wait(
        seconds,
        [
            {"event": "interpreter, imports, options", "begin": 0.0, "end": found[0]["begin"]},
            *found,
            {"event": "prompt, first token", "begin": loaded, "end": seconds},
        ],
    )


def show(found: list[dict[str, Any]]) -> None:
    for one in found:
        seconds = one["end"] - one["begin"]
        rate = f"  {one['bytes'] / seconds / 1e9:.1f} GB/s" if "bytes" in one else ""
        print(f"{one['begin']:6.3f} to {one['end']:6.3f} s: {seconds:.3f}  {one['event']}{rate}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a path or a name headrace knows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", "-r", type=int, default=5)
    parser.add_argument("--stages", action="store_true", help="of the last of them")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    path = hub.resolve(arguments.model)
    device, cache, times = arguments.device, hub.cache_dir(), range(arguments.repetitions)
    first_token(path, device, cache)  # compiled from here on
    waits, reads = zip(
        *((first_token(path, device, cache), raw_read(path)) for _ in times), strict=True
    )
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with tempfile.TemporaryDirectory() as empty:
        first_run = first_token(path, device, Path(empty)).seconds
    seconds, from_load = [one.seconds for one in waits], [one.from_load for one in waits]
    if arguments.json:
        facts = {
            "model": arguments.model,
            "device": device,
            "size": path.stat().st_size,
            "seconds": seconds,
            "from_load_seconds": from_load,
            "raw_read_seconds": reads,
            "first_run_seconds": first_run,
            "peak_resident_bytes": peak,
        }
        print(json.dumps(facts | ({"stages": waits[-1].stages} if arguments.stages else {})))
        return
    read = statistics.median(reads)
    for what, of in (("first token", seconds), ("from load() on", from_load)):
        median = statistics.median(of)
        print(f"{what} {median:.2f} s ({min(of):.2f} to {max(of):.2f})", end="")
        print(f", {median / read:.2f} times as long as to read the file ({read:.2f} s)")
    print(f"first token of the very first run, compiling {first_run:.1f} s")
    print(f"peak resident memory {peak / 1e6:.0f} MB, file {path.stat().st_size / 1e6:.0f} MB")
    if arguments.stages:
        show(waits[-1].stages)


if __name__ == "__main__":
    main()
