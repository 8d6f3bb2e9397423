"""How long a person waits: from the start of ``headrace run`` to the first byte of the answer.

    python bench/first_token.py smollm2
    python bench/first_token.py llama-8b.gguf --device cuda

Runs the program five times as it is found compiled, then once with an empty cache, as on the day it
is installed. Beside it: how long the file takes to be read, from the page cache, by one thread into
one buffer. Peak memory is the largest resident set that the system saw, page cache of the weights
included.
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
from pathlib import Path

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


def first_token(path: Path, device: str, cache: Path) -> float:
    """Seconds to the first byte on stdout of a program whose kernels are in ``cache``."""
    command = [sys.executable, "-m", "headrace", "run", str(path), PROMPT, "-n", "32"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a path or a name headrace knows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", "-r", type=int, default=5)
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
    if arguments.json:
        facts = {"model": arguments.model, "seconds": seconds, "first_run_seconds": first_run}
        facts |= {"device": device, "raw_read_seconds": reads}
        print(json.dumps(facts | {"size": path.stat().st_size, "peak_resident_bytes": peak}))
        return
    median, read = statistics.median(seconds), statistics.median(reads)
    print(f"first token {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"the file alone {read:.2f} s: the first token takes {median / read:.2f} times as long")
    print(f"first token of the very first run, compiling {first_run:.1f} s")
    print(f"peak resident memory {peak / 1e6:.0f} MB, file {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
