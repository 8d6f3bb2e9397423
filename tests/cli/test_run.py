"""``headrace run``: what goes to stdout, what to stderr, and how it ends."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_program import Headrace, Start

import headrace as library

GREEDY = ("--temp", "0", "-n", "8", "--device", "reference")


SEED_7 = ("-n", "40", "--device", "reference", "-q", "--seed", "7")


@pytest.fixture(scope="module")
def answer_to_seed_7(tiny: str) -> str:
    with library.load(tiny, "reference") as model:
        message = {"role": "user", "content": "hello"}
        return model.chat([message], seed=7, max_tokens=40).text + "\n"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def set_stdin(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))

    return set_stdin


def test_the_answer_is_the_librarys_and_goes_to_stdout_alone(headrace: Headrace, tiny: str) -> None:
    with library.load(tiny, "reference") as model:
        chat = model.chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=8)
        system = model.chat(
            [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}],
            temperature=0,
            max_tokens=8,
        )
        raw = model.generate("hello", temperature=0, max_tokens=8)
    assert len({chat.text, system.text, raw.text}) == 3
    result = headrace("run", tiny, "hello", *GREEDY)
    assert (result.code, result.out) == (0, chat.text + "\n")
    n_prompt = chat.timings.prompt_tokens
    assert result.err.startswith(f"prompt: {n_prompt} tokens, ")
    assert "answer: 8 tokens, " in result.err
    assert headrace("run", tiny, "hello", "--system", "be", *GREEDY).out == system.text + "\n"
    assert headrace("run", tiny, "hello", "--raw", *GREEDY).out == raw.text + "\n"
    quiet = headrace("run", tiny, "hello", "--quiet", *GREEDY)
    assert (quiet.out, quiet.err) == (chat.text + "\n", "")


def test_json_has_the_answer_and_its_figures(headrace: Headrace, tiny: str) -> None:
    result = headrace("run", tiny, "hello", "--json", *GREEDY)
    answer = json.loads(result.out)
    assert answer["text"] + "\n" == headrace("run", tiny, "hello", *GREEDY).out
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == len(answer["tokens"]) == 8
    assert answer["decode_tokens_per_second"] > 0
    assert answer["time_to_first_token"] > 0


@pytest.mark.parametrize(
    "option",
    [
        ("--top-k", "1"),
        ("--top-p", "0"),
        ("--min-p", "1"),
        ("--repeat-penalty", "1.5"),
        ("--presence-penalty", "2"),
        ("--frequency-penalty", "2"),
        ("--seed", "8"),
        ("--stop", "e"),
        ("--temperature", "1.7"),
    ],
)
def test_every_sampling_option_reaches_the_sampler(
    headrace: Headrace, tiny: str, answer_to_seed_7: str, option: tuple[str, ...]
) -> None:
    result = headrace("run", tiny, "hello", *SEED_7, *option)
    assert result.code == 0, result.err
    assert result.out != answer_to_seed_7


def test_repeat_last_n_bounds_the_repeat_penalty(
    headrace: Headrace, tiny: str, answer_to_seed_7: str
) -> None:
    options = ("--repeat-penalty", "1.5", "--repeat-last-n", "0")
    assert headrace("run", tiny, "hello", *SEED_7, *options).out == answer_to_seed_7


def test_the_same_seed_gives_the_same_text(
    headrace: Headrace, tiny: str, answer_to_seed_7: str
) -> None:
    assert headrace("run", tiny, "hello", *SEED_7).out == answer_to_seed_7


def test_the_prompt_may_be_piped_or_in_a_file(
    headrace: Headrace, tiny: str, pipe: Callable[[bytes], None], tmp_path: Path
) -> None:
    expected = headrace("run", tiny, "héllo\n", *GREEDY).out
    for prompt in ((), ("-",)):
        pipe("héllo\n".encode())
        assert headrace("run", tiny, *prompt, *GREEDY).out == expected
    file = tmp_path / "prompt"
    file.write_text("héllo\n", "utf-8")
    assert headrace("run", tiny, "--file", str(file), *GREEDY).out == expected


def test_without_a_prompt_it_says_how_to_give_one(
    headrace: Headrace, tiny: str, pipe: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(b"")
    assert "the prompt is empty" in headrace("run", tiny).err
    pipe(b"\xff")
    assert "stdin is not UTF-8 text" in headrace("run", tiny).err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "give a PROMPT, or pipe one in" in headrace("run", tiny).err


def test_ctrl_c_ends_it_quietly(start: Start, endless: str) -> None:
    process = start("run", endless, "hello", "--device", "reference", "--temp", "1", "-n", "2000")
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "headrace:" not in err


def test_a_reader_that_leaves_ends_it_quietly(start: Start, endless: str) -> None:
    process = start("run", endless, "hello", "--device", "reference", "--temp", "1", "-n", "2000")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""


def test_a_reader_that_has_left_before_anything_came_ends_it_quietly(start: Start) -> None:
    process = start("models")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""
