"""``POST /v1/responses``: OpenAI's newer form of the same, text in and text out.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from headrace.api import Model, make_request
from headrace.serve import completing as common
from headrace.serve import constrain, sse
from headrace.serve.generation import Generation
from headrace.serve.problems import Problem
from headrace.serve.schemas import (
    InputMessage,
    ResponseJSONObject,
    ResponseJSONSchema,
    ResponsesRequest,
)
from headrace.serve.service import Service

router = APIRouter()


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, http: HTTPRequest) -> Response:
    """Answer an input, whole or as a stream of events. Nothing is stored."""
    service = common.service_of(http)
    service.check_model(body.model)
    turns = _turns(body)

    def encode(model: Model) -> list[int]:
        service.check_length(sum(len(turn["content"]) for turn in turns))
        return model.chat_template.encode_chat(turns)

    prompt = await service.text("input", encode)
    options: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    if body.temperature is not None:
        options["temperature"] = body.temperature
    if body.top_p is not None:
        options["top_p"] = body.top_p
    options["mask"] = await service.mask(_grammar(body), "text")
    request = await service.text("input", lambda _: make_request(prompt, options))
    generation = service.generate([request], "input")
    common.note(http, body.user, generation)
    answer = _Answer(service, generation, body)
    if body.stream:
        return sse.EventStream(answer.stream())
    [choice] = await generation.collect()
    return JSONResponse(answer.whole(choice.text, choice.finish_reason))


def _turns(body: ResponsesRequest) -> list[dict[str, Any]]:
    given = body.input
    if isinstance(given, str):
        given = [InputMessage(role="user", content=given)]
    turns = []
    for message in given:
        content = message.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": content})
    if body.instructions:
        turns.insert(0, {"role": "system", "content": body.instructions})
    return turns


def _grammar(body: ResponsesRequest) -> str | None:
    form = body.text.format if body.text is not None else None
    if isinstance(form, ResponseJSONSchema):
        return constrain.json_grammar(form.schema_, "text")
    if isinstance(form, ResponseJSONObject):
        return constrain.json_grammar({"type": "object"}, "text")
    return None


class _Answer:
    def __init__(self, service: Service, generation: Generation, body: ResponsesRequest) -> None:
        self._generation, self._body = generation, body
        self._name = service.settings.served_name
        self._id, self._created = common.new_id("resp"), common.now()
        self._message_id = common.new_id("msg")
        self._n_events = 0

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        status = "incomplete" if finish == "length" else "completed"
        return self._response(status, [self._message(status, [_part(text)])])

    async def stream(self) -> AsyncIterator[bytes]:
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self._response("in_progress", []))
            yield self._event("response.in_progress", response=self._response("in_progress", []))
            item = self._message("in_progress", [])
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **place, part=_part(""))
            text, finish = "", "stop"
            async for piece in self._generation:
                if piece.text:
                    text += piece.text
                    delta = {"delta": piece.text, "logprobs": []}
                    yield self._event("response.output_text.delta", **place, **delta)
                finish = piece.finish_reason or finish
        except Problem as problem:
            failed = self._response("failed", [])
            failed["error"] = {"code": "server_error", "message": str(problem)}
            yield self._event("response.failed", response=failed)
            return
        whole = self.whole(text, finish)
        item = whole["output"][0]
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._n_events
        self._n_events += 1
        return sse.event({"type": kind, "sequence_number": number, **fields}, kind)

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "type": "message", "id": self._message_id, "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, usage = self._body, self._generation.usage
        over = status == "incomplete"
        counted = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if over else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(
                by_alias=True, exclude_none=True
            ),
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": counted if output else None,
            "metadata": {},
        }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
