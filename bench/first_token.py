"""How long a person waits: from the start of ``headrace run`` to the first byte of the answer.

    python bench/first_token.py smollm2
    python bench/first_token.py llama-8b.gguf --device cuda

    python bench/first_token.py llama-8b.gguf --device cuda --stages

Runs the program five times as it is found compiled, then once with an empty cache, as on the day it
is installed. Beside it: how long the file takes to be read, from the page cache, by one thread into
one buffer. Peak memory is the largest resident set that the system saw, page cache of the weights
included. With --stages one more run shows what the wait consists of, and what runs beside what.
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
from collections.abc import Sequence
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


def first_token(
    path: Path, device: str, cache: Path, program: Sequence[str] = ("-m", "headrace")
) -> float:
    """Seconds to the first byte on stdout of a program whose kernels are in ``cache``."""
    command = [sys.executable, *program, "run", str(path), PROMPT, "-n", "32"]
    command += ["--device", device]
    start = time.perf_counter()
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
    return seconds


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


def stages(path: Path, device: str, cache: Path) -> list[dict[str, Any]]:
    """One run's stages in the order they began in: ``event``, and from the start of the program
    ``begin`` and ``end``, seconds; ``bytes`` of those that pass over many."""
    with tempfile.NamedTemporaryFile() as log:
        begin = time.time()
        first = first_token(path, device, cache, ["-c", _TRACED, log.name])
        records = [json.loads(line) for line in log.read().splitlines()]
    found = []
    for record in records:
        end = datetime.fromisoformat(record.pop("time")).timestamp() - begin
        if end < first:
            found.append(record | {"begin": end - record.pop("seconds"), "end": end})
    found.sort(key=lambda one: one["begin"])
    loaded = max(one["end"] for one in found if "kernels" not in one["event"])
    return [
        {"event": "interpreter, imports, options", "begin": 0.0, "end": found[0]["begin"]},
        *found,
        {"event": "prompt, first token", "begin": loaded, "end": first},
    ]


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
    parser.add_argument("--stages", action="store_true", help="of one more run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    path = hub.resolve(arguments.model)
    device, cache, times = arguments.device, hub.cache_dir(), range(arguments.repetitions)
    first_token(path, device, cache)  # compiled from here on
    seconds, reads = zip(
        *((first_token(path, device, cache), raw_read(path)) for _ in times), strict=True
    )
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with tempfile.TemporaryDirectory() as empty:
        first_run = first_token(path, device, Path(empty))
    found = stages(path, device, cache) if arguments.stages else []
    if arguments.json:
        facts = {"model": arguments.model, "seconds": seconds, "first_run_seconds": first_run}
        facts |= {"device": device, "raw_read_seconds": reads}
        facts |= {"stages": found} if found else {}
        print(json.dumps(facts | {"size": path.stat().st_size, "peak_resident_bytes": peak}))
        return
    median, read = statistics.median(seconds), statistics.median(reads)
    print(f"first token {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"the file alone {read:.2f} s: the first token takes {median / read:.2f} times as long")
    print(f"first token of the very first run, compiling {first_run:.1f} s")
    print(f"peak resident memory {peak / 1e6:.0f} MB, file {path.stat().st_size / 1e6:.0f} MB")
    show(found)


if __name__ == "__main__":
    main()
