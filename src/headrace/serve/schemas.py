"""What clients may ask, as pydantic models of OpenAI's API reference.

Anything else is refused by name: a field is never taken and ignored. Fields of which only the
value that changes nothing is possible here are typed as that value, because clients send them.
Omitted sampling fields have headrace's own defaults (:class:`headrace.sampling.SamplingParams`).
Every list stops at its first error: a million of them would take pydantic a minute to write down.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from headrace.engine.request import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from headrace.sampling import MAX_LOGPROBS

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_PARTS = 1024
MAX_TOKENS = 2**18
"""Of one text to detokenise."""
_MAX_INT = 2**31 - 1

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
_Positive = Annotated[int, Field(ge=1, le=_MAX_INT)]
_Tokens = Annotated[list[_TokenId], Field(fail_fast=True, min_length=1)]
_Nothing = Annotated[list[Any], Field(max_length=0)]
_User = Annotated[str, Field(max_length=256, description="Goes to the log.")]


def _only_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported here")
    return value


# Not Literal[False], which takes 0 as well.
_False = Annotated[bool, AfterValidator(_only_false), Field(json_schema_extra={"const": False})]


class Body(BaseModel):
    """A JSON object in which unknown fields, NaN, and booleans for numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What completions and chat have in common."""

    model: Annotated[str, Field(max_length=512)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: _Positive | None = None
    stop: (
        _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=1024),
        ]
        | None
    ) = None
    ignore_eos: bool | None = False
    user: _User | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    def sampling_options(self) -> dict[str, Any]:
        """Options of :class:`headrace.sampling.SamplingParams` that were given."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty",
                 "frequency_penalty", "repetition_penalty", "seed")  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return given


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: _Name
    arguments: str


class ToolCall(Body):
    id: Annotated[str, Field(max_length=128)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn. The fields after ``tool_call_id`` come back from answers and must be empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = (
        None
    )
    name: _Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    refusal: None = None
    annotations: _Nothing | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("tool_calls belong to an assistant's message")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id belongs to a tool's message")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def as_turn(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": content or ""}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return turn


_Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class Function(Body):
    name: _Name
    description: Annotated[str, Field(max_length=65536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: _Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JSONSchema(Body):
    name: _Name
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JSONObjectFormat(Body):
    type: Literal["json_object"]


class JSONSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: _Messages
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    store: _False | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=1)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.tools and self.tool_choice != "none" and self.wants_json:
            raise ValueError("response_format cannot be had together with tools")
        if self.ignore_eos and (self.wants_json or self.tools):
            raise ValueError("ignore_eos cannot be had together with response_format or tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        return self

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"


class CompletionRequest(Sampling):
    """``POST /v1/completions``. A prompt is text or token ids; or a list of either."""

    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)]
        | Annotated[list[_Tokens], Field(fail_fast=True, min_length=1, max_length=1024)]
    )
    max_tokens: _Positive | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: _False | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``. The input is text or token ids; or a list of either."""

    model: Annotated[str, Field(max_length=512)] | None = None
    input: (
        str
        | _Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=4096)]
        | Annotated[list[_Tokens], Field(fail_fast=True, min_length=1, max_length=4096)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    user: _User | None = None


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: _Nothing | None = None
    logprobs: _Nothing | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(fail_fast=True, max_length=MAX_PARTS)]
    id: Annotated[str, Field(max_length=128)] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class ResponseText(Body):
    type: Literal["text"]


class ResponseJSONObject(Body):
    type: Literal["json_object"]


class ResponseJSONSchema(JSONSchema):
    type: Literal["json_schema"]


class ResponseTextOptions(Body):
    format: (
        Annotated[
            ResponseText | ResponseJSONObject | ResponseJSONSchema, Field(discriminator="type")
        ]
        | None
    ) = None


class ResponsesRequest(Body):
    """``POST /v1/responses``: text in, text out. Nothing is stored."""

    model: Annotated[str, Field(max_length=512)] | None = None
    input: (
        str
        | Annotated[
            list[InputMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
        ]
    )
    instructions: str | None = None
    max_output_tokens: _Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = False
    text: ResponseTextOptions | None = None
    store: _False | None = None
    background: _False | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    previous_response_id: None = None
    tools: _Nothing | None = None
    user: _User | None = None


class TokenizeRequest(Body):
    """``POST /tokenize``: a text, or a conversation as the chat template writes it."""

    text: str | None = None
    messages: _Messages | None = None
    special: Annotated[bool, Field(description="Control tokens in the text become tokens.")] = False
    bos: Annotated[bool, Field(description="Begin with BOS if the model asks for it.")] = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages")
        if self.messages is not None and (self.special or self.bos):
            raise ValueError("special and bos belong to text")
        return self


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    tokens: Annotated[list[_TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]
    special: Annotated[bool, Field(description="Show control tokens.")] = False
