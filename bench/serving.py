"""What ``headrace serve`` promises under load, measured and judged.

    python bench/serving.py smollm2
    python bench/serving.py llama-8b.gguf --device cuda --context 16384 --batch-invariant

Starts a server, loads the same model here too, and lets the two work in turns:

- N greedy streams at once: each text as it is alone
- tok/s of the server over the engine's own with as many rows: at least 0.8
- the slowest of the live probes during a long prompt: at most 100 ms
- the first token of a long prompt asked again: at least 5 times sooner

Each is done once before it counts, since kernels compile when they are first needed. Medians
decide. The exit status is 1 when a promise is not kept. Others' share of the machine is printed
beside each figure: more than a few percent, and the figure means little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import headrace
from headrace import hub
from headrace.api import make_request
from headrace.engine.sequence import Event
from headrace.serve.load import Load, run

TICKS = os.sysconf("SC_CLK_TCK")
IDS = range(300, 9000)


@contextmanager
def served(path: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The URL and process id of a server that is ready."""
    command = [sys.executable, "-m", "headrace", "serve", str(path), "--port", "0"]
    command += ["--context", str(arguments.context), "--device", arguments.device]
    command += ["--max-sequences", str(arguments.rows)]
    command += ["--batch-invariant"] if arguments.batch_invariant else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            try:
                record = json.loads(line)
            except ValueError:
                sys.exit(line.strip())
            url = record.get("url", url)
            if record["event"] == "ready":
                break
        else:
            sys.exit("the server did not start")
        # Nobody may have to wait for a full pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield url, process.pid
        finally:
            process.terminate()


class Others:
    """``with Others(pid) as others: …``; then the share of this machine that others had."""

    share = 0.0

    def __init__(self, pid: int) -> None:
        self._pids = (os.getpid(), pid)

    def __enter__(self) -> Others:
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        busy, whole, ours = (b - a for a, b in zip(self._start, self._now(), strict=True))
        self.share = max(0.0, busy - ours) / max(whole, 1)

    def _now(self) -> tuple[int, int, int]:
        """Ticks: of all that ran, of all there were, and of our own processes. (proc(5))"""
        first = Path("/proc/stat").read_text().partition("\n")[0]
        times = [int(word) for word in first.split()[1:9]]
        ours = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        return sum(times) - times[3] - times[4], sum(times), ours


def prompt(rng: random.Random, n: int) -> list[int]:
    return rng.choices(IDS, k=n)


def engine_speed(model: headrace.Model, n: int, tokens: int, rng: random.Random) -> float:
    """tok/s of ``n`` rows in the engine of this process."""
    left = n

    def sink(event: Event) -> None:
        nonlocal left
        left -= event.finish_reason is not None

    for _ in range(n):
        options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        model.engine.add(make_request(prompt(rng, 16), options), sink)
    start = time.perf_counter()
    while left:
        model.engine.step()
    return n * tokens / (time.perf_counter() - start)


async def texts(url: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """Greedy streams of all ``prompts`` at once."""

    async def one(client: httpx.AsyncClient, ids: Sequence[int]) -> str:
        body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True}
        found = ""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    found += json.loads(line[6:])["choices"][0]["text"]
        return found

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        return list(await asyncio.gather(*(one(client, ids) for ids in prompts)))


def equal_texts(url: str, n: int, tokens: int, rng: random.Random) -> int:
    """How many of ``n`` streams say at once what they say alone."""
    prompts = [prompt(rng, 8 + i) for i in range(n)]
    together = asyncio.run(texts(url, prompts, tokens))
    alone = [asyncio.run(texts(url, [ids], tokens))[0] for ids in prompts]
    return sum(a == b for a, b in zip(together, alone, strict=True))


def slowest_probe(url: str, n: int, rng: random.Random) -> float:
    """Seconds of the slowest live probe while a prompt of ``n`` tokens is read."""
    body = {"prompt": prompt(rng, n), "max_tokens": 1}
    with (
        httpx.Client(base_url=url, timeout=600) as client,
        httpx.Client(base_url=url, timeout=600) as other,
    ):
        client.get("/health/live")
        reading = threading.Thread(target=lambda: other.post("/v1/completions", json=body))
        reading.start()
        slowest = 0.0
        while reading.is_alive():
            start = time.perf_counter()
            client.get("/health/live")
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.002)
    return slowest


def first_token_seconds(url: str, ids: Sequence[int]) -> float:
    body = {"prompt": ids, "max_tokens": 1, "stream": True, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_bytes())
            return time.perf_counter() - start


def rounds(name: str, unit: str, n: int, pid: int, measure: Callable[[], float]) -> dict[str, Any]:
    """``measure`` some times, the first for nothing: each value, their median, and what others took
    of the machine."""
    values, shares = [], []
    measure()
    for _ in range(n):
        with Others(pid) as others:
            values.append(measure())
        shares.append(others.share)
    median = statistics.median(values)
    shown = ", ".join(f"{value:.4g}" for value in values)
    print(f"{name}: {median:.4g} {unit} ({shown}; others had {100 * max(shares):.0f}%)", flush=True)
    return {"median": median, "values": values, "others": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a path or a name headrace knows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=32, help="streams at once (32)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repetitions", "-r", type=int, default=5)
    parser.add_argument("--batch-invariant", action="store_true", help="see headrace.load")
    parser.add_argument("--json", action="store_true", help="print a line of JSON, too")
    arguments = parser.parse_args()
    path = hub.resolve(arguments.model)
    n, tokens, times = arguments.rows, arguments.tokens, arguments.repetitions
    long = arguments.context - 64
    rng = random.Random(1)
    speeds: list[tuple[float, float]] = []
    with (
        served(path, arguments) as (url, pid),
        headrace.load(path, arguments.device, context=arguments.context, max_sequences=n,
                      cache_tokens=4 * arguments.context,
                      batch_invariant=arguments.batch_invariant) as model,
    ):  # fmt: skip
        equal = equal_texts(url, n, min(tokens, 24), rng)
        print(f"{equal} of {n} streams say at once what they say alone", flush=True)

        def ratio() -> float:
            engine = engine_speed(model, n, tokens, rng)
            load = Load(url, n_requests=n, concurrency=n, prompt_tokens=16, max_tokens=tokens,
                        seed=len(speeds))  # fmt: skip
            speeds.append((engine, asyncio.run(run(load))["output_tokens_per_second"]))
            return speeds[-1][1] / engine

        ratios = rounds("server over engine", "of its tok/s", times, pid, ratio)
        engine, server = (statistics.median(side) for side in zip(*speeds[1:], strict=True))
        print(f"  engine {engine:.1f} tok/s, server {server:.1f} tok/s", flush=True)
        probes = rounds(
            "slowest live probe", "s", times, pid, lambda: slowest_probe(url, long, rng)
        )

        firsts: list[tuple[float, float]] = []

        def sooner() -> float:
            ids = prompt(rng, long)
            firsts.append((first_token_seconds(url, ids), first_token_seconds(url, ids)))
            return firsts[-1][0] / firsts[-1][1]

        again = rounds("the same prompt again", "times sooner", times, pid, sooner)
        first, second = (statistics.median(side) for side in zip(*firsts[1:], strict=True))
        print(f"  {long:,} tokens: {first:.4f} s, again {second:.4f} s", flush=True)
    facts = {"model": arguments.model, "device": model.device, "rows": n, "equal": equal,
             "batch_invariant": arguments.batch_invariant,
             "engine_tokens_per_second": engine, "server_tokens_per_second": server,
             "ratio": ratios, "slowest_probe": probes, "sooner": again,
             "first_token_seconds": {"tokens": long, "first": first, "again": second}}  # fmt: skip
    if arguments.json:
        print(json.dumps(facts))
    kept = (equal == n, ratios["median"] >= 0.8, probes["median"] <= 0.1, again["median"] >= 5)
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
