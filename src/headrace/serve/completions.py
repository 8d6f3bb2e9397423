"""``POST /v1/completions``: plain text, continued."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from headrace.api import Model
from headrace.engine.request import Request
from headrace.sampling import TokenLogprob
from headrace.serve import completing as common
from headrace.serve import sse
from headrace.serve.generation import Choice, Generation
from headrace.serve.schemas import CompletionRequest
from headrace.serve.service import Service

router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionRequest, http: HTTPRequest) -> Response:
    """Continue each prompt ``n`` times, whole or as a stream of events."""
    service = common.service_of(http)
    service.check_model(body.model)
    prompts = as_prompts(body.prompt)
    n = body.n or 1
    common.check_choices(service, n * len(prompts), "n" if n > 1 else "prompt")

    def build(model: Model) -> list[Request]:
        return [
            request
            for ids in service.tokenise(model, prompts)
            for request in common.engine_requests(
                body, ids, max_tokens=body.max_tokens, logprobs=body.logprobs, masks=[None] * n
            )
        ]

    requests = await service.text("prompt", build)
    generation = service.generate(requests, "prompt")
    common.note(http, body.user, generation)
    answer = _Answer(service, generation, body, len(requests))
    if body.stream:
        return sse.EventStream(answer.stream())
    choices = await generation.collect()
    return await common.respond(service, lambda: answer.whole(choices), choices)


def as_prompts(given: str | list[Any]) -> list[str | list[int]]:
    """One prompt, or several."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return given


class _Answer:
    def __init__(
        self, service: Service, generation: Generation, body: CompletionRequest, n: int
    ) -> None:
        self._generation, self._body = generation, body
        self._tokenizer = service.model.tokenizer
        self._name = service.settings.served_name
        self._id, self._created = common.new_id("cmpl"), common.now()
        self._shown = [_Shown() for _ in range(n)]

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        listed = [
            self._choice(i, one.text, one.logprobs, one.finish_reason)
            for i, one in enumerate(choices)
        ]
        return self._object(choices=listed, usage=self._generation.usage.as_json())

    async def stream(self) -> AsyncIterator[bytes]:
        async for piece in self._generation:
            entries = [] if piece.logprobs is None else [piece.logprobs]
            choice = self._choice(piece.index, piece.text, entries, piece.finish_reason)
            yield sse.event(self._object(choices=[choice]))
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            usage = self._generation.usage.as_json()
            yield sse.event(self._object(choices=[], usage=usage))

    def _choice(
        self, index: int, text: str, entries: list[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None if self._body.logprobs is None else self._logprobs(index, entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any]:
        """Four lists side by side; offsets count characters from the start of the answer."""
        data = [self._tokenizer.token_bytes(entry.token) for entry in entries]
        return {
            "tokens": [_token(one) for one in data],
            "token_logprobs": [max(entry.logprob, -9999.0) for entry in entries],
            "top_logprobs": [
                {
                    _token(self._tokenizer.token_bytes(token)): max(value, -9999.0)
                    for token, value in entry.top
                }
                for entry in entries
            ],
            "text_offset": [self._shown[index].offset(one) for one in data],
        }

    def _object(self, **fields: Any) -> dict[str, Any]:
        return {
            "id": self._id, "object": "text_completion", "created": self._created,
            "model": self._name, **fields,
        }  # fmt: skip


class _Shown:
    """How many characters of an answer came before each of its tokens."""

    def __init__(self) -> None:
        self._n = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def offset(self, token: bytes) -> int:
        before = self._n
        self._n += len(self._decoder.decode(token))
        return before


def _token(data: bytes) -> str:
    """A token's text, or as OpenAI writes the pieces of a character: ``bytes:\\xe6\\x97``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
