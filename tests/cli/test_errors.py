"""Every error: one line on stderr that says what to do, nothing on stdout, exit code 1."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_program import Headrace

import headrace.cli.models
from headrace.synth import write_synthetic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "smolm2", "hi"), "unknown model 'smolm2' (did you mean 'smollm2'?)"),
        (("run", "missing.gguf", "hi"), "no such file: missing.gguf"),
        (("info", "{folder}"), "is a folder: give the path of a .gguf file in it"),
        (("info", "{text}"), "GGUF"),
        (("run", "{tiny}", "hi", "--temp", "1000"), "temperature must be a number from 0 to 100"),
        (("run", "{tiny}", "hi", "--temp", "nan"), "temperature must be a number from 0 to 100"),
        (("run", "{tiny}", "hi", "--temp", "warm"), "'--temp': "),
        (("run", "{tiny}", "hi", "-n", "0"), "max_tokens must be a whole number from 1"),
        (("run", "{tiny}", "hi", "--stop", ""), "stop: each must be a string"),
        (("run", "{tiny}", "hi", "-t", "0"), "--threads"),
        (("run", "{tiny}", ""), "the prompt is empty"),
        (("run", "{tiny}", "hi", "-c", "1"), "context"),
        (("run", "{tiny}", "hi", "-c", "999999"), "context"),
        (("run", "{tiny}", "hi " * 3000), "context"),
        (("run", "{tiny}", "hi", "--file", "x"), "give a PROMPT or --file, not both"),
        (("run", "{tiny}", "--file", "missing"), "cannot read missing: No such file"),
        (("run", "{tiny}", "hi", "--raw", "--system", "x"), "--system needs a chat template"),
        (("run", "{tiny}", "hi", "--device", "tpu"), "unknown device 'tpu'"),
        (("run", "{tiny}", "hi", "--bogus"), "No such option: --bogus (see 'headrace run --help')"),
        (("run",), "Missing argument 'MODEL'"),
        (("walk",), "No such command 'walk'"),
        (("synth", "llama-9b"), "unknown shape 'llama-9b': use one of llama-1b"),
        (("synth", "llama-tiny", "Q9"), "unknown recipe 'Q9': use one of"),
        (("synth", "llama-tiny", "-o", "{tiny}"), "exists: give another --output, or --force"),
        (("bench", "{tiny}", "-p", "0", "-n", "0"), "nothing to measure"),
        (("info", "{tiny}", "-c", "9999"), "context must be a whole number from 1 to 2048"),
        (("bench", "{tiny}", "-p", "x"), "-p takes whole numbers separated by commas, not 'x'"),
        (
            ("bench", "{tiny}", "-d", "5000"),
            "needs 5512 positions, the model has a context of 2048",
        ),
        (("ppl", "{tiny}", "-f", "{text}"), "fewer than a chunk of 512: give a longer text"),
        (("ppl", "{tiny}", "-f", "{tiny}"), "is not UTF-8 text"),
        (("pull", "missing.gguf"), "no such file"),
    ],
)
def test_an_error_is_one_line(
    headrace: Headrace,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("some words")
    names = {"{tiny}": tiny, "{folder}": str(tmp_path), "{text}": str(tmp_path / "text")}
    arguments = tuple(names.get(argument, argument) for argument in arguments)
    if arguments[0] in ("run", "ppl", "bench") and "--device" not in arguments:
        arguments += ("--device", "reference")
    result = headrace(*arguments)
    assert result.code == 1
    assert result.out == ""
    # A progress line may come first when stderr is no terminal.
    *before, line = result.err.splitlines()
    assert all(text.endswith("…") for text in before)
    assert line.startswith("headrace: ")
    assert message in line


def test_what_cannot_run_says_why(headrace: Headrace, tmp_path: Path, tiny: str) -> None:
    """An architecture headrace does not know: ``run`` refuses, ``info`` still shows the file."""
    content = Path(tiny).read_bytes()
    assert b"general.architecture" in content
    path = tmp_path / "other.gguf"
    path.write_bytes(content.replace(b"llama", b"lambd"))
    assert "architecture 'lambd' is not supported" in headrace("run", str(path), "hi").err
    shown = headrace("info", str(path))
    assert shown.code == 0
    assert "headrace cannot run it: architecture 'lambd' is not supported" in shown.out
    assert "Q8_0" in shown.out


def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, tiny: str
) -> None:
    from headrace.cli import main
    from headrace.errors import HubError

    for arguments in (("--debug", "pull", "nothing"), ("pull", "nothing", "--debug")):
        monkeypatch.setattr("sys.argv", ["headrace", *arguments])
        with pytest.raises(HubError):
            main()


def test_a_bug_is_one_line_that_asks_for_a_report(
    headrace: Headrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(headrace_models(), "cached_models", fail)
    result = headrace("models")
    assert result.code == 1
    assert result.err.startswith("headrace: internal error: ZeroDivisionError: division by zero")
    assert len(result.err.splitlines()) == 1


def headrace_models() -> object:
    return headrace.cli.models.hub


def test_a_base_model_continues_text_and_does_not_chat(
    headrace: Headrace, tmp_path: Path, tiny: str
) -> None:
    path = tmp_path / "base.gguf"
    write_synthetic(path, "llama-tiny", "Q8_0")
    content = path.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_tempest_")
    path.write_bytes(content)
    options = ("--temp", "0", "-n", "8", "--device", "reference", "-q")
    raw = headrace("run", tiny, "hello", "--raw", *options)
    assert headrace("run", str(path), "hello", *options).out == raw.out
    refused = headrace("chat", str(path), "--device", "reference")
    assert refused.code == 1
    assert "has no chat template, it only continues text" in refused.err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_bug(closed: str) -> None:
    program = shlex.join([sys.executable, "-m", "headrace"])
    commands = {"<&-": "run nothing", ">&-": "models", "2>&-": "models"}
    done = subprocess.run(
        f"{program} {commands[closed]} {closed}", shell=True, capture_output=True, text=True
    )
    assert "internal error" not in done.stderr
    assert done.returncode == (1 if closed == "<&-" else 0)


def test_no_command_shows_the_help_and_nothing_else(headrace: Headrace) -> None:
    result = headrace()
    assert result.code == 2
    assert "COMMAND" in result.out
    assert result.err == ""
