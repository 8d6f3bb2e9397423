"""The ``headrace`` program, in this process or in one of its own, and a tiny model for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_program import Headrace, Result, Start

from headrace.cli import main
from headrace.synth import write_synthetic


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a random model with a chat template and a context of 2048."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_synthetic(path, "llama-tiny", "Q8_0")
    return str(path)


@pytest.fixture(scope="session")
def endless(tiny: str) -> str:
    """The same without a token that ends an answer: it goes on to the end of the context."""
    path = Path(tiny).with_name("endless.gguf")
    content = Path(tiny).read_bytes()
    for old, new in (
        (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.xxx_token_id"),
        (b"<|im_end|>", b"<|im_xxx|>"),
        (b"<|end_of_text|>", b"<|xxx_xx_xxxx|>"),
    ):
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def headrace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Headrace:
    """Call the program with these arguments, in this process."""

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def start() -> Start:
    """Start the program with these arguments, as a process with pipes."""

    def popen(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "headrace", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADRACE_CACHE", str(folder))
    return folder
