"""What the completing routes share: requests for the engine, logprobs, identity."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from headrace.api import make_request
from headrace.engine.request import Request
from headrace.sampling import LogitsMask, TokenLogprob
from headrace.serve.exchange import EXCHANGE, Exchange
from headrace.serve.generation import Choice, Generation
from headrace.serve.problems import Problem
from headrace.serve.schemas import Sampling
from headrace.serve.service import Service
from headrace.text.tokenizer import Tokenizer

_MANY = 5_000
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def service_of(http: HTTPRequest) -> Service:
    service: Service = http.app.state.service
    return service


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:24]}"


def engine_requests(
    body: Sampling,
    prompt: Sequence[int],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    masks: Sequence[LogitsMask | None],
) -> list[Request]:
    """One request a choice of ``prompt``; choice ``i`` of a seeded request has seed + i.

    Takes a while for a long prompt: for :meth:`Service.text`.
    """
    options = body.sampling_options() | {"max_tokens": max_tokens, "logprobs": logprobs}
    options["ignore_eos"] = bool(body.ignore_eos)
    if body.stop is not None:
        options["stop"] = body.stop
    requests = []
    for i, mask in enumerate(masks):
        if body.seed is not None:
            options["seed"] = (body.seed + i) % 2**64
        requests.append(make_request(prompt, options | {"mask": mask}))
    return requests


def check_choices(service: Service, n: int, param: str) -> None:
    """A 400 when one request wants more completions than the server makes of one."""
    most = service.settings.max_choices
    if n > most:
        raise Problem(400, f"{param}: {n} completions are more than the {most} this server makes "
                      "of one request", param=param, code="invalid_value")  # fmt: skip


def note(
    http: HTTPRequest, user: str | None, generation: Generation | None = None, **facts: Any
) -> None:
    """What the log says of a request besides its route and time: counts and who, never text.

    From here on ``generation`` ends when the request does.
    """
    exchange: Exchange = http.scope[EXCHANGE]
    exchange.note(user, generation, **facts)


async def respond(
    service: Service, answer: Callable[[], dict[str, Any]], choices: Sequence[Choice]
) -> Response:
    """``answer()``, of ``choices``, as JSON; in a thread if they have many log probabilities."""
    n = sum(1 + len(entry.top) for choice in choices for entry in choice.logprobs)
    if n < _MANY:
        return JSONResponse(answer())
    # Piece by piece: the encoder in C would keep all threads waiting until it is done.
    content = await service.in_thread(lambda: "".join(_ENCODER.iterencode(answer())).encode())
    return Response(content, media_type="application/json")


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    content = [
        entry(one.token, one.logprob)
        | {"top_logprobs": [entry(*alternative) for alternative in one.top]}
        for one in entries
    ]
    return {"content": content, "refusal": None}


def now() -> int:
    return int(time.time())
