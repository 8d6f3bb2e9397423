"""``headrace bench-serve``: load for a server, and what its clients see."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from headrace.cli import console
from headrace.cli.options import Json
from headrace.errors import HeadraceError, RequestError

_URL = Annotated[str, typer.Argument(metavar="[URL]", help="The server's address.")]
_Requests = Annotated[int, typer.Option("--requests", "-n", min=1, help="Requests in all.")]
_Concurrency = Annotated[
    int, typer.Option("--concurrency", "-c", min=1, help="Clients that ask in turns (closed loop).")
]
_Rate = Annotated[
    float | None,
    typer.Option(
        "--rate", "-r", help="Requests a second, whatever the answers (open loop).",
        show_default="closed loop",
    ),
]  # fmt: skip
_Prompt = Annotated[int, typer.Option("--prompt-tokens", "-p", min=1, help="Tokens of a prompt.")]
_Tokens = Annotated[int, typer.Option("--max-tokens", "-t", min=1, help="Tokens of an answer.")]
_Model = Annotated[str | None, typer.Option("--model", help="The model's id.")]
_Seed = Annotated[int, typer.Option("--seed", "-s", help="Same seed, same prompts.")]


def bench_serve(
    url: _URL = "http://127.0.0.1:8000",
    requests: _Requests = 64,
    concurrency: _Concurrency = 8,
    rate: _Rate = None,
    prompt_tokens: _Prompt = 128,
    max_tokens: _Tokens = 64,
    model: _Model = None,
    seed: _Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure a running server: requests/s, tok/s, and the times to and between tokens.

    Prompts are random tokens, all different, so none is found in a cache. An API key is taken from
    HEADRACE_API_KEY.
    """
    if rate is not None and rate <= 0:
        raise RequestError("--rate must be above 0")
    try:
        from headrace.serve import load
    except ImportError as error:
        if (error.name or "").startswith("headrace"):
            raise
        raise HeadraceError(
            f"bench-serve needs the extra 'serve' ({error.name} is missing): "
            "pip install 'headrace[serve]'"
        ) from None
    import asyncio

    wanted = load.Load(
        url=url.rstrip("/").removesuffix("/v1"),
        model=model,
        api_key=os.environ.get("HEADRACE_API_KEY"),
        n_requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    facts = asyncio.run(load.run(wanted))
    loop = {"rate": rate} if rate is not None else {"concurrency": concurrency}
    facts = {"url": url, **loop, **facts}
    print(json.dumps(facts, indent=2) if as_json else _as_text(facts))
    if not facts["completed"]:
        raise HeadraceError(f"no request was completed: {facts['errors']}")


def _as_text(facts: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("", "p50", "p95", "p99")]
    for name, title in (
        ("time_to_first_token", "time to first token, ms"),
        ("inter_token", "between tokens, ms"),
        ("request_seconds", "whole answer, ms"),
    ):
        cells = (facts[name][p] for p in ("p50", "p95", "p99"))
        rows.append((title, *("-" if cell is None else f"{1000 * cell:.1f}" for cell in cells)))
    errors = ", ".join(f"{count} of {error}" for error, count in facts["errors"].items())
    return (
        f"{facts['completed']} of {facts['requests']} requests in {facts['seconds']:.1f} s: "
        f"{facts['requests_per_second']:.2f} requests/s, "
        f"{facts['output_tokens_per_second']:.1f} tok/s\n"
        + (f"errors: {errors}\n" if errors else "")
        + console.columns(rows, right=(1, 2, 3))
    )
