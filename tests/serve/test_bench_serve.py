"""``headrace bench-serve`` against a real server: both loops, what it counts, and refusals."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serve_process import SLOW, Server
from typer.testing import CliRunner, Result

from headrace.cli.app import app
from headrace.serve import load
from headrace.serve.load import Outcome, percentiles, summarise

KEYS = Path(__file__).parents[2] / "docs/json.md"


def bench(url: str, *arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["bench-serve", url, *arguments], env=environment)


def all_keys(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(all_keys, value.values()))


@pytest.mark.real_model
@pytest.mark.parametrize("loop", [("--concurrency", "4"), ("--rate", "50")])
def test_both_loops_report_what_was_asked(server: Server, loop: tuple[str, str]) -> None:
    before = server.metric("headrace_tokens_total", kind="generated")
    arguments = ("-n", "8", *loop, "-p", "20", "-t", "6", "--json", "--model", "smollm2")
    result = bench(server.url + "/v1", *arguments)
    facts = json.loads(result.output)
    assert (facts["requests"], facts["completed"], facts["errors"]) == (8, 8, {})
    assert (facts["prompt_tokens"], facts["output_tokens"]) == (8 * 20, 8 * 6)
    assert server.metric("headrace_tokens_total", kind="generated") == before + 8 * 6
    assert facts["requests_per_second"] == pytest.approx(8 / facts["seconds"])
    first, whole = facts["time_to_first_token"], facts["request_seconds"]
    assert 0 < first["p50"] <= first["p99"] <= whole["p99"] <= facts["seconds"]
    section = KEYS.read_text().partition("## bench-serve\n")[2].partition("\n## ")[0]
    assert all_keys(facts) <= set(re.findall(r"`(\w+)`", section))
    server.check_pages()


@pytest.mark.parametrize(("rate", "at_once"), [(1000.0, 4), (None, 1)])
def test_the_open_loop_does_not_wait_for_answers(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, rate: float | None, at_once: int
) -> None:
    """All arrive while the first is being answered; in a closed loop of one they take turns."""
    outcomes: list[Outcome] = []
    monkeypatch.setattr(load, "_IDS", range(300, 500))  # of the tiny vocabulary
    monkeypatch.setattr(load, "summarise", outcomes.extend)
    server = start("--max-sequences", "8", device=SLOW)
    wanted = load.Load(server.url, n_requests=4, concurrency=1, rate=rate, max_tokens=60)
    asyncio.run(load.run(wanted))
    running = [sum(a.sent <= b.sent < a.ended for a in outcomes) for b in outcomes]
    assert max(running) == at_once


def test_what_fails_is_said(start: Callable[..., Server]) -> None:
    server = start()
    refused = bench(server.url, "-n", "2")  # ids of a larger vocabulary
    assert "1 of HTTP 400: prompt token" in refused.output
    assert refused.exit_code == 1
    gone = bench("http://127.0.0.1:1", "-n", "2")
    assert "2 of ConnectError" in gone.output
    assert gone.exit_code == 1
    assert bench(server.url, "--rate", "0").exit_code == 1
    assert bench(server.url, "--model", "other", "-n", "1").exit_code == 1


def test_the_key_is_taken_from_the_environment(start: Callable[..., Server]) -> None:
    keys = {"HEADRACE_API_KEYS": "a-secret-key"}
    server = start(ready=False, env={**os.environ, **keys})
    server.wait_ready({"Authorization": "Bearer a-secret-key"})
    assert "HTTP 401" in bench(server.url, "-n", "1").output
    assert "HTTP 400" in bench(server.url, "-n", "1", HEADRACE_API_KEY="a-secret-key").output


def test_figures() -> None:
    good = Outcome(sent=1.0, arrivals=[2.0, 2.5, 4.0], ended=4.5, prompt_tokens=7,
                   completion_tokens=3)  # fmt: skip
    bad = Outcome(sent=0.0, arrivals=[9.0], ended=10.0, completion_tokens=99, error="HTTP 429")
    facts = summarise([good, bad])
    assert (facts["requests"], facts["completed"], facts["errors"]) == (2, 1, {"HTTP 429": 1})
    assert facts["output_tokens_per_second"] == pytest.approx(3 / 10)
    assert facts["time_to_first_token"]["p50"] == 1.0
    assert facts["inter_token"] == {"p50": 0.5, "p95": 1.5, "p99": 1.5}
    assert facts["request_seconds"]["p99"] == 3.5


def test_percentiles() -> None:
    assert percentiles(range(1, 101)) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}
