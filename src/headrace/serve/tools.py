"""Tool calls: how they are put to the model, forced by a grammar, and read from its text.

The form is the one most open models were trained on (Hermes, Qwen):

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that writes it itself is given the tools. To any other model the same form is
explained in the system message.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.serve.constrain import JSON_OPTIONS
from headrace.serve.problems import Problem

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16
_HEAD, _MIDDLE, _TAIL = f'{OPEN}\n{{"name": ', ', "arguments": ', f"}}\n{CLOSE}"


def is_native(template: str) -> bool:
    """Whether a chat template's source writes tools and calls in this form."""
    return OPEN in template and "tools" in template


def grammar(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], parallel: bool,
            param: str) -> str:  # fmt: skip
    """The grammar of an answer: calls only when they are required, or text that may lead to them.

    tools: OpenAI's ``{"function": {"name", "parameters"}}``. choice: "auto", "required" or the
    function that must be called.
    """
    functions = [tool["function"] for tool in tools]
    if not isinstance(choice, str):
        wanted = choice["function"]["name"]
        functions = [function for function in functions if function["name"] == wanted]
        if not functions:
            raise Problem(400, "tool_choice names a function that is not among the tools",
                          param="tool_choice", code="invalid_value")  # fmt: skip
    rules = []
    for i, function in enumerate(functions):
        schema = {**(function.get("parameters") or {"type": "object"}), "x-guidance": JSON_OPTIONS}
        try:
            body = json.dumps(schema)
        except (RecursionError, ValueError) as error:
            raise Problem(400, f"{param}: {error}", param=param, code="invalid_schema") from None
        start = json.dumps(f'\n{{"name": {json.dumps(function["name"])}{_MIDDLE}')
        rules += [f"call_{i}: {start} arguments_{i} {json.dumps(_TAIL)}",
                  f"arguments_{i}: %json {body}"]  # fmt: skip
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    more = f'("\\n" {json.dumps(OPEN)} call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    if choice == "auto":
        # Text, until it says that a call begins; from there on, calls.
        rules += [f"start: TEXT | begin call {more}",
                  f"begin[lazy]: /(.|\\n)*{OPEN}/", "TEXT: /(.|\\n)*/"]  # fmt: skip
    else:
        rules.append(f"start: {json.dumps(OPEN)} call {more}")
    return "\n".join(["%llguidance {}", *rules, f"call: {calls}"])


def explain(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system message says to a model whose template does not know tools."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the user's request. Their signatures are:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call one, answer with nothing but a JSON object of its name and arguments:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <arguments-object>}}\n{CLOSE}'
    )


def spell_out(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with calls and their results as text, for a template that knows neither."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        text = message.get("content") or ""
        if message["role"] == "tool":
            answer = f"<tool_response>\n{text}\n</tool_response>"
            plain.append({"role": "user", "content": answer})
            continue
        calls = [_as_text(call["function"]) for call in message.get("tool_calls") or ()]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        plain.append({**kept, "content": "\n".join([*([text] if text else []), *calls])})
    return plain


def with_objects(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with the arguments of calls as objects, as templates that know tools expect."""
    turns = []
    for message in messages:
        turn = dict(message)
        if "tool_calls" in turn:
            turn["tool_calls"] = [_with_object(call) for call in turn["tool_calls"]]
        turns.append(turn)
    return turns


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _arguments(function)}}


def _arguments(function: Mapping[str, Any]) -> Any:
    try:
        return json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return function["arguments"]  # what a model wrote when it ran out of tokens


def _as_text(function: Mapping[str, Any]) -> str:
    return (
        f"{_HEAD}{json.dumps(function['name'])}{_MIDDLE}{json.dumps(_arguments(function))}{_TAIL}"
    )


@dataclass
class Call:
    """One call, or what has been added to it: ``name`` and ``id`` come with its first piece."""

    index: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None

    def as_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def as_delta(self) -> dict[str, Any]:
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        return {"index": self.index, **self.as_json()}


@dataclass
class CallReader:
    """Splits an answer, as it is made, into text and calls. :meth:`push` gives what is new."""

    n_calls: int = 0
    _text: str = ""  # not yet told apart
    _inside: bool = False  # of the arguments of a call
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False
    _events: list[Call | str] = field(default_factory=list)

    def push(self, text: str) -> list[Call | str]:
        self._events = []
        self._text += text
        while self._text and (self._read_arguments() if self._inside else self._read_text()):
            pass
        return self._events

    def flush(self) -> list[Call | str]:
        """The end of the answer: a call that only began is text."""
        rest, self._text = self._text, ""
        return [rest] if rest and not self._inside and not self.n_calls else []

    def _read_text(self) -> bool:
        at = self._text.find(OPEN)
        if at < 0:
            keep = _overlap(self._text, OPEN)
            self._show(self._text[: len(self._text) - keep])
            self._text = self._text[len(self._text) - keep :]
            return False
        end = self._text.find(_MIDDLE, at)
        if end < 0:
            self._show(self._text[:at])
            self._text = self._text[at:]
            return False
        self._show(self._text[:at])
        name = json.loads(self._text[at + len(_HEAD) : end])
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        self._events.append(Call(self.n_calls, name=name, id=call_id))
        self.n_calls += 1
        self._text = self._text[end + len(_MIDDLE) :]
        self._inside, self._depth = True, 0
        return True

    def _show(self, text: str) -> None:
        if text and not self.n_calls:  # between calls there is only white space
            self._events.append(text)

    def _read_arguments(self) -> bool:
        """Pass the object on up to the brace that closes it."""
        for at, char in enumerate(self._text):
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._add(self._text[: at + 1])
                    self._text = self._text[at + 1 :].removeprefix(_TAIL)
                    self._inside = False
                    return True
        self._add(self._text)
        self._text = ""
        return False

    def _add(self, arguments: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Call) and last.index == self.n_calls - 1:
            last.arguments += arguments
        else:
            self._events.append(Call(self.n_calls - 1, arguments))


def read_all(answer: str) -> tuple[str, list[Call]]:
    """A whole answer as its text and its calls."""
    reader = CallReader()
    text: list[str] = []
    calls: list[Call] = []
    for part in reader.push(answer) + reader.flush():
        if isinstance(part, str):
            text.append(part)
        elif part.name is not None:
            calls.append(part)
        else:
            calls[-1].arguments += part.arguments
    return "".join(text).strip(), calls


def _overlap(text: str, mark: str) -> int:
    """Letters at the end of ``text`` with which ``mark`` may begin."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
