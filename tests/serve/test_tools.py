"""Tool calls as text: read back however the answer is cut, and forced by a grammar."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from headrace.serve import constrain
from headrace.serve.constrain import Grammars, _compile, _vocabulary, json_grammar
from headrace.serve.tools import Call, CallReader, grammar, read_all, spell_out

FIRST = '<tool_call>\n{"name": "f", "arguments": {"a": "}]\\"{", "b": [1, {"c": 2}]}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
    "additionalProperties": False}}} for name in ("f", "g")]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_answers_in_pieces(size: int) -> None:
    answer = f"Let me see. {FIRST}\n{SECOND}"
    reader = CallReader()
    parts = []
    for at in range(0, len(answer), size):
        parts += reader.push(answer[at : at + size])
    parts += reader.flush()
    text = "".join(part for part in parts if isinstance(part, str))
    arguments = ["", ""]
    for part in parts:
        if isinstance(part, Call):
            arguments[part.index] += part.arguments
    names = [part.name for part in parts if isinstance(part, Call) and part.name]
    assert text == "Let me see. "
    assert names == ["f", "g"]
    assert json.loads(arguments[0]) == {"a": '}]"{', "b": [1, {"c": 2}]}
    assert json.loads(arguments[1]) == {}


@pytest.mark.parametrize("answer", ["a < b", "<tool", "<tool_call>", "<tool_call>\n{", ""])
def test_what_is_no_call_stays_text(answer: str) -> None:
    assert read_all(answer) == (answer, [])


class Letters:
    """A tokeniser of single bytes."""

    n_vocab, bos_id, end_ids = 257, None, frozenset({256})

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b"<end>"

    def is_control(self, token: int) -> bool:
        return token == 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def allows(rules: str, answer: str) -> bool:
    matcher = _compile(_vocabulary(Letters()), rules)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(answer.encode())) and matcher.is_accepting()


def call(name: str, arguments: str = '{"a": 1}') -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_the_grammar_of_required_calls() -> None:
    rules = grammar(TOOLS, "required", True, "tools")
    assert allows(rules, call("f"))
    assert allows(rules, call("f") + "\n" + call("g"))
    for wrong in ("Hello", call("h"), call("f", "{}"), call("f", '{"a": "x"}'), "x" + call("f")):
        assert not allows(rules, wrong)
    assert not allows(grammar(TOOLS, "required", False, "tools"), call("f") + "\n" + call("g"))
    named = grammar(TOOLS, {"function": {"name": "g"}}, True, "tools")
    assert allows(named, call("g"))
    assert not allows(named, call("f"))


def test_the_grammar_of_calls_that_may_be_made() -> None:
    rules = grammar(TOOLS, "auto", True, "tools")
    assert allows(rules, "Hello, is 1 < 2?")
    assert allows(rules, call("f"))
    assert allows(rules, "Let me see.\n" + call("f") + "\n" + call("g"))
    assert not allows(rules, call("f", '{"a": "x"}'))
    assert not allows(rules, call("h"))


def test_a_conversation_spelt_out_for_a_template_without_tools() -> None:
    asked = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = spell_out(
        [
            {"role": "user", "content": "Do it"},
            {"role": "assistant", "content": "", "tool_calls": [asked]},
            {"role": "tool", "content": "done", "tool_call_id": "1"},
        ]
    )
    assert turns[1] == {"role": "assistant", "content": call("f")}
    assert turns[2]["role"] == "user"
    assert "done" in turns[2]["content"]


def test_masks_do_not_wait_for_somebody_s_new_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step waits for its masks: a compilation of seconds must not be in front of them."""

    async def accept(grammar: str, param: str) -> None:
        """Stands for the child process, which takes as long: only what comes after it counts."""

    monkeypatch.setattr(constrain, "_check", accept)
    slow = {f"p{i}": {"type": "string", "pattern": f"^[a-z]{{{i % 50}}}x.*{i}$"}
            for i in range(2_000)}  # fmt: skip
    grammars = Grammars()
    grammars.prepare(Letters())

    async def run() -> int:
        string = json_grammar({"type": "string"}, "response_format")
        mask = await grammars.mask(string, 257, "response_format")
        compiling = asyncio.create_task(
            grammars.mask(json_grammar({"properties": slow}, "tools"), 257, "tools")
        )
        answer = b'"'
        while not compiling.done():
            allowed = await asyncio.to_thread(mask, list(answer))
            assert allowed[ord("a")] == (len(answer) > 0)
            answer += b"a"
        await compiling
        return len(answer)

    assert asyncio.run(run()) > 20
    grammars.close()


def test_the_same_new_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    async def accept(grammar: str, param: str) -> None:
        checked.append(grammar)
        await asyncio.sleep(0)

    monkeypatch.setattr(constrain, "_check", accept)
    grammars = Grammars()
    grammars.prepare(Letters())
    rules = json_grammar({"enum": ["x"]}, "response_format")

    async def run() -> list[np.ndarray]:
        masks = await asyncio.gather(*(grammars.mask(rules, 257, "tools") for _ in range(20)))
        return [mask([]) for mask in masks]

    found = asyncio.run(run())
    assert len(checked) <= 2  # as many as are compiled at once
    assert [np.flatnonzero(mask).tolist() for mask in found] == [[ord('"')]] * 20
    grammars.close()
