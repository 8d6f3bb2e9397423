"""A load generator: many streaming completions, and when their tokens arrived.

Closed loop: ``concurrency`` clients, each of which asks again as soon as it is answered. Open loop:
requests arrive at ``rate`` a second by a Poisson process, whether or not the server keeps up, as
strangers' requests do. Any server of ``/v1/completions`` that takes token ids can be measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

_IDS = range(100, 20_000)  # in every vocabulary, and no control token in most


@dataclass(frozen=True)
class Load:
    """What to ask. rate: requests a second; None is a closed loop of ``concurrency`` clients."""

    url: str
    model: str | None = None
    api_key: str | None = None
    n_requests: int = 64
    concurrency: int = 8
    rate: float | None = None
    prompt_tokens: int = 128
    max_tokens: int = 64
    seed: int = 0
    timeout: float = 600.0


@dataclass
class Outcome:
    """One request: seconds since the start of the run, and what came of it."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


async def run(load: Load) -> dict[str, Any]:
    """Put ``load`` on the server; figures as :func:`summarise` gives them."""
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=load.url, headers=headers, timeout=load.timeout, limits=limits
    ) as client:
        start = time.perf_counter()
        rng = random.Random(load.seed)
        bodies = [_body(load, rng) for _ in range(load.n_requests)]
        if load.rate is None:
            outcomes = await _closed_loop(client, bodies, load.concurrency, start)
        else:
            outcomes = await _open_loop(client, bodies, load.rate, start, rng)
    return summarise(outcomes)


def _body(load: Load, rng: random.Random) -> bytes:
    body = {
        "prompt": rng.choices(_IDS, k=load.prompt_tokens),
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.model is not None:
        body["model"] = load.model
    return json.dumps(body).encode()


async def _closed_loop(
    client: httpx.AsyncClient, bodies: list[bytes], concurrency: int, start: float
) -> list[Outcome]:
    left = iter(bodies)
    outcomes: list[Outcome] = []

    async def work() -> None:
        for body in left:
            outcomes.append(await _ask(client, body, start))  # noqa: PERF401  # one at a time

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return outcomes


async def _open_loop(
    client: httpx.AsyncClient, bodies: list[bytes], rate: float, start: float, rng: random.Random
) -> list[Outcome]:
    tasks = []
    at = start
    for body in bodies:
        at += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(_ask(client, body, start)))
    return list(await asyncio.gather(*tasks))


async def _ask(client: httpx.AsyncClient, body: bytes, start: float) -> Outcome:
    outcome = Outcome(time.perf_counter() - start)
    headers = {"Content-Type": "application/json"}
    try:
        async with client.stream(
            "POST", "/v1/completions", content=body, headers=headers
        ) as response:
            if response.status_code != 200:
                outcome.error = _refusal(response.status_code, await response.aread())
            else:
                await _read(response, outcome, start)
    except httpx.HTTPError as error:
        outcome.error = type(error).__name__
    outcome.ended = time.perf_counter() - start
    return outcome


def _refusal(status: int, body: bytes) -> str:
    """``HTTP 400: prompt token 512 is …``, as far as the answer says why."""
    try:
        return f"HTTP {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


async def _read(response: httpx.Response, outcome: Outcome, start: float) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            outcome.error = str(event["error"].get("code"))
        elif usage := event.get("usage"):
            outcome.prompt_tokens = usage["prompt_tokens"]
            outcome.completion_tokens = usage["completion_tokens"]
        elif event["choices"][0]["text"]:
            outcome.arrivals.append(time.perf_counter() - start)


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of a run, over the requests that succeeded. Latencies are in seconds.

    ``inter_token`` is the time between arrivals of text, which is a token nearly always.
    """
    good = [one for one in outcomes if one.error is None and one.arrivals]
    seconds = max((one.ended for one in outcomes), default=0.0)
    gaps = [
        later - earlier
        for one in good
        for earlier, later in zip(one.arrivals, one.arrivals[1:], strict=False)
    ]
    tokens = sum(one.completion_tokens for one in good)
    return {
        "requests": len(outcomes),
        "completed": len(good),
        "errors": dict(Counter(one.error for one in outcomes if one.error is not None)),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds if seconds else 0.0,
        "output_tokens_per_second": tokens / seconds if seconds else 0.0,
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "output_tokens": tokens,
        "time_to_first_token": percentiles(one.arrivals[0] - one.sent for one in good),
        "inter_token": percentiles(gaps),
        "request_seconds": percentiles(one.ended - one.sent for one in good),
    }


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """Nearest-rank p50, p95 and p99; None of nothing."""
    ordered = sorted(values)
    found: dict[str, float | None] = {}
    for share in (50, 95, 99):
        rank = -(-len(ordered) * share // 100)
        found[f"p{share}"] = ordered[rank - 1] if ordered else None
    return found
