"""What a person sees of bytes that take a while."""

from __future__ import annotations

import sys

import pytest

from headrace.cli import console

GB = 1_000_000_000


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock.monotonic)
    return clock


def test_what_is_quick_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    began = []
    with console.byte_progress("loading", after=1.0, begin=lambda: began.append(1)) as show:
        for done in range(1, 11):
            clock.now += 0.09
            show("m.gguf", done * GB, 10 * GB)
    assert capsys.readouterr().err == ""
    assert not began


def test_what_is_slow_says_each_tenth(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    began = []
    with console.byte_progress("loading", after=1.0, begin=lambda: began.append(1)) as show:
        for done in range(1, 11):
            show("m.gguf", done * GB, 10 * GB)
            clock.now += 0.6
    assert began == [1]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading m.gguf: 30% of 10 GB"
    assert lines[-1] == "loading m.gguf: 100% of 10 GB"


def test_a_terminal_has_a_bar(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.byte_progress("loading", after=1.0) as show:
        show("m.gguf", GB, 10 * GB)
        clock.now += 2
        show("m.gguf", 4 * GB, 10 * GB)
    shown = capsys.readouterr().err
    assert "loading m.gguf" in shown
    assert "4.0/10.0 GB" in shown
