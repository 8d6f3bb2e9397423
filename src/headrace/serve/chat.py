"""``POST /v1/chat/completions``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from headrace.api import Model
from headrace.serve import completing as common
from headrace.serve import constrain, sse, tools
from headrace.serve.generation import Choice, Generation
from headrace.serve.schemas import ChatRequest, JSONSchemaFormat, Message, NamedTool
from headrace.serve.service import Service

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, http: HTTPRequest) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    service = common.service_of(http)
    service.check_model(body.model)
    n = body.n or 1
    common.check_choices(service, n, "n")
    uses_tools = bool(body.tools) and body.tool_choice != "none"
    offered = [tool.model_dump(exclude_none=True) for tool in body.tools or () if uses_tools]
    prompt = await service.text(
        "messages", lambda model: encode(service, model, body.messages, offered)
    )
    grammar, param = _grammar(body, uses_tools)
    masks = [await service.mask(grammar, param) for _ in range(n)]
    max_tokens = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = await service.text(
        "messages",
        lambda _: common.engine_requests(
            body, prompt, max_tokens=max_tokens, logprobs=logprobs, masks=masks
        ),
    )
    generation = service.generate(requests, "messages")
    common.note(http, body.user, generation)
    answer = _Answer(service, generation, body, uses_tools)
    if body.stream:
        return sse.EventStream(answer.stream())
    choices = await generation.collect()
    return await common.respond(service, lambda: answer.whole(choices), choices)


def encode(
    service: Service,
    model: Model,
    messages: Sequence[Message],
    offered: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Token ids of a conversation in which the tools ``offered`` may be called."""
    turns = [message.as_turn() for message in messages]
    calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
    service.check_length(
        sum(len(turn["content"]) for turn in turns)
        + sum(len(call["arguments"]) for call in calls)
        + sum(len(json.dumps(tool)) for tool in offered)
    )
    template = model.chat_template
    if tools.is_native(str(model.metadata.get("tokenizer.chat_template"))):
        return template.encode_chat(tools.with_objects(turns), tools=offered or None)
    turns = tools.spell_out(turns)
    if offered:
        system = turns[0]["content"] + "\n\n" if turns[0]["role"] == "system" else ""
        rest = turns[1:] if turns[0]["role"] == "system" else turns
        turns = [{"role": "system", "content": system + tools.explain(offered)}, *rest]
    return template.encode_chat(turns)


def _grammar(body: ChatRequest, uses_tools: bool) -> tuple[str | None, str]:
    """The grammar that the answer must keep to, if any, and the field that asks for it."""
    if uses_tools:
        choice: str | dict[str, Any] = "auto"
        if isinstance(body.tool_choice, NamedTool):
            choice = body.tool_choice.model_dump()
        elif body.tool_choice is not None:
            choice = body.tool_choice
        offered = [tool.model_dump() for tool in body.tools or ()]
        parallel = body.parallel_tool_calls is not False
        return tools.grammar(offered, choice, parallel, "tools"), "tools"
    if body.wants_json:
        schema: dict[str, Any] = {"type": "object"}
        if isinstance(body.response_format, JSONSchemaFormat):
            schema = body.response_format.json_schema.schema_
        return constrain.json_grammar(schema, "response_format"), "response_format"
    return None, ""


@dataclass
class _Answer:
    """Writes what was generated as OpenAI's objects."""

    service: Service
    generation: Generation
    body: ChatRequest
    uses_tools: bool

    def __post_init__(self) -> None:
        self._id, self._created = common.new_id("chatcmpl"), common.now()
        self._tokenizer = self.service.model.tokenizer

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        listed = [self._choice(index, choice) for index, choice in enumerate(choices)]
        usage = self.generation.usage.as_json()
        return self._object("chat.completion", choices=listed, usage=usage)

    async def stream(self) -> AsyncIterator[bytes]:
        """Each choice begins with its role; the last event has the usage, if it is wanted."""
        n = self.body.n or 1
        readers = [tools.CallReader() for _ in range(n)]
        for index in range(n):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for piece in self.generation:
            reader = readers[piece.index]
            finish = piece.finish_reason
            if self.uses_tools:
                parts = reader.push(piece.text) + (reader.flush() if finish else [])
            else:
                parts = [piece.text] if piece.text else []
            logprobs = None
            if piece.logprobs is not None:
                logprobs = common.chat_logprobs([piece.logprobs], self._tokenizer)
                parts = parts or [""]
            for part in parts:
                delta = (
                    {"content": part}
                    if isinstance(part, str)
                    else {"tool_calls": [part.as_delta()]}
                )
                yield self._chunk(piece.index, delta, logprobs)
                logprobs = None
            if finish is not None:
                yield self._chunk(piece.index, {}, None, _finish(finish, reader.n_calls))
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            usage = self.generation.usage.as_json()
            yield sse.event(self._object("chat.completion.chunk", choices=[], usage=usage))

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        n_calls = 0
        if self.uses_tools:
            text, calls = tools.read_all(choice.text)
            message["content"], n_calls = text or None, len(calls)
            if calls:
                message["tool_calls"] = [call.as_json() for call in calls]
        logprobs = None
        if self.body.logprobs:
            logprobs = common.chat_logprobs(choice.logprobs, self._tokenizer)
        finish = _finish(choice.finish_reason, n_calls)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse.event(self._object("chat.completion.chunk", choices=[choice]))

    def _object(self, kind: str, **fields: Any) -> dict[str, Any]:
        model = self.service.settings.served_name
        return {
            "id": self._id, "object": kind, "created": self._created, "model": model, **fields
        }  # fmt: skip


def _finish(reason: str, n_calls: int) -> str:
    return "tool_calls" if n_calls and reason == "stop" else reason
