"""``POST /v1/completions``: plain text, continued."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

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
    ids = await service.text("prompt", lambda model: service.tokenise(model, prompts))
    requests = [
        request
        for tokens in ids
        for request in common.engine_requests(
            body, tokens, max_tokens=body.max_tokens, logprobs=body.logprobs, masks=[None] * n
        )
    ]
    generation = Generation(service, requests, "prompt")
    common.note(http, generation, body.user)
    answer = _Answer(service, generation, body, len(requests))
    if body.stream:
        return sse.EventStream(generation, answer.stream())
    return JSONResponse(answer.whole(await generation.collect(http)))


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
        self._n_shown = [0] * n

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
        tokens = [self._text(entry.token) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._n_shown[index])
            self._n_shown[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, -9999.0) for entry in entries],
            "top_logprobs": [
                {self._text(token): max(value, -9999.0) for token, value in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")

    def _object(self, **fields: Any) -> dict[str, Any]:
        return {
            "id": self._id, "object": "text_completion", "created": self._created,
            "model": self._name, **fields,
        }  # fmt: skip
