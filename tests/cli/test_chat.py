"""``headrace chat``: a conversation through a pipe and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from cli_program import Headrace, Result

import headrace as library

PROMPT = "\x1b[?2004h"
"""What the terminal is sent when a prompt begins (bracketed paste on)."""

PROMPT_END = "\x1b[?2004l"

GREEDY = ("--device", "reference", "--temp", "0", "-n", "6")


@pytest.fixture
def chat(headrace: Headrace, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Pipe lines into ``headrace chat``."""

    def call(*lines: str, options: tuple[str, ...] = GREEDY) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return headrace("chat", tiny, *options)

    return call


@pytest.fixture(scope="module")
def answer(tiny: str) -> Iterator[Callable[..., str]]:
    """The library's answer to the last of these messages, from user and assistant in turn."""
    with library.load(tiny, "reference") as model:

        def ask(*contents: str, system: str | None = None) -> str:
            messages = [{"role": "system", "content": system}] if system else []
            roles = ("user", "assistant")
            messages += [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
            return model.chat(messages, temperature=0, max_tokens=6).text

        yield ask


def test_it_remembers_what_was_said(
    chat: Callable[..., Result], answer: Callable[..., str]
) -> None:
    first = answer("one")
    second = answer("one", first, "two")
    assert second != answer("two")
    result = chat("one", "", "two")
    assert (result.code, result.out) == (0, f"{first}\n{second}\n")


def test_commands_change_the_conversation(
    chat: Callable[..., Result], answer: Callable[..., str]
) -> None:
    plain, with_system = answer("one"), answer("one", system="be brief")
    assert plain != with_system
    result = chat("one", "/system be brief", "one", "/system", "one", "/clear", "one", "/retry")
    assert result.out.splitlines() == [plain, with_system, plain, plain, plain]


def test_set_changes_the_next_answer_and_shows_the_options(
    chat: Callable[..., Result], answer: Callable[..., str]
) -> None:
    longest = answer("one")
    result = chat("/set max_tokens 2", "one", "/set", "/set max_tokens = none", "/set")
    assert longest.startswith(result.out.strip())
    assert len(result.out.strip()) < len(longest)
    shown = re.findall(r"^  max_tokens +(\S+)", result.err, re.MULTILINE)
    assert shown == ["2", "None"]
    assert "(cut off" in result.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/help", "/clear          forget the conversation"),
        ("/stats", "nothing was answered yet"),
        ("/retry", "there is no answer to try again"),
        ("/dance", "there is no command /dance: /help lists them"),
        ("/set warmth 1", "there is no option 'warmth': use one of temperature, top_k"),
        ("/set temperature hot", "temperature takes a number, not 'hot'"),
        ("/set temperature 1000", "temperature must be a number from 0 to 100, not 1000.0"),
        ("word " * 3000, "or /clear to start again"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    chat: Callable[..., Result], answer: Callable[..., str], line: str, message: str
) -> None:
    result = chat(line, "one", "/quit", "never")
    assert result.code == 0
    assert message in result.err
    assert result.out == answer("one") + "\n"


def test_lines_between_quotes_are_one_message(
    chat: Callable[..., Result], answer: Callable[..., str]
) -> None:
    expected = answer("one\n\ntwo") + "\n"
    assert chat('"""one', "", 'two"""').out == expected
    assert chat('"""', "one", "", "two", '"""').out == expected
    assert chat('"""', "one", "", "two").out == expected  # the end of the input closes them
    assert chat('"""one"""').out == answer("one") + "\n"


def test_stats_count_the_room_left(chat: Callable[..., Result]) -> None:
    result = chat("one", "two", "/stats")
    line = next(line for line in result.err.splitlines() if line.startswith("prompt: "))
    assert re.search(r"\(\d+ cached\)", line)  # the first turn is not computed again
    assert re.search(r"; \d+ of 2,048 tokens used$", line)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process, self._fd = pty.fork()
        if self.process == 0:
            os.environ |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execv(sys.executable, [sys.executable, "-m", "headrace", *arguments])
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, seconds: float = 90) -> str:
        """What is shown up to ``text``, which is taken off the screen."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise AssertionError(f"no {text!r} in {self.screen!r}")
            self.screen += os.read(self._fd, 65536).decode(errors="replace")
        before, _, self.screen = self.screen.partition(text)
        return before

    def exit_code(self, seconds: float = 90) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.read(self._fd, 65536)
            except OSError:  # the other end is closed
                break
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    program = Terminal(*arguments)
    try:
        yield program
    finally:
        try:
            os.kill(program.process, signal.SIGKILL)
            os.waitpid(program.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(program._fd)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(endless: str) -> None:
    with terminal("chat", endless, "--device", "reference", "--temp", "1") as program:
        program.wait_for("/help for help")
        program.wait_for(PROMPT)
        program.type("hello\r")
        program.wait_for(PROMPT_END)
        program.wait_for("e")  # somewhere in the answer
        program.type("\x03\x03")
        program.wait_for("(stopped)")
        program.wait_for(PROMPT)
        program.type("dropped\x03")
        program.wait_for(PROMPT)
        program.type("/stats\r")
        program.wait_for("tokens used")
        program.wait_for(PROMPT)
        program.type("\x04")
        assert program.exit_code() == 0


def test_alt_enter_begins_a_new_line(tiny: str, answer: Callable[..., str]) -> None:
    with terminal("chat", tiny, *GREEDY) as program:
        program.wait_for(PROMPT)
        program.type("one\x1b\rtwo\r")
        program.wait_for(answer("one\ntwo").split()[0])
        program.type("/quit\r")
        assert program.exit_code() == 0
