"""The table in the terminal: whole figures at any width, and what they say."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console

from headrace.profile.terminal import WIDE, bar_of, seconds, show


def drawn(profile, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    show(profile, console)
    return console.file.getvalue()


@pytest.fixture
def profile(fake, profiled):
    """A millisecond of the third part of every layer, 10 µs of the others; half of it waiting."""
    runner = fake(lambda part: 1e-3 if part.name == "rest" else 1e-5)
    runner.waiting = lambda part: 0.0 if part.host else runner.seconds(part) / 2
    runner.n_threads = 2
    return profiled(runner, tokens=3)


@pytest.mark.parametrize("width", [80, WIDE, 160])
def test_no_figure_is_cut_off(profile, width):
    """Names may break, as those of a GPU's kernels do; figures may not."""
    long = "norm, q/k/v matmul, rotary, cache"
    records = tuple(
        dataclasses.replace(r, part=dataclasses.replace(r.part, name=f"{long} {r.name}"))
        for r in profile.records
    )
    text = drawn(dataclasses.replace(profile, records=records), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    figures = [line for line in text.splitlines() if re.search(r"\d%", line)]
    assert len(figures) > len(profile.parts)
    assert ("FLOP/B" in text) == (width >= WIDE)


def test_the_rows_say_what_was_measured(profile):
    text = drawn(profile, WIDE)
    rest = next(
        g for g in profile.parts if (g.first.operation, g.first.name) == ("ProjectQKV", "rest")
    )
    row = next(line for line in text.splitlines() if re.match(r" +rest ", line))
    share = rest.seconds.mean / profile.seconds.mean
    assert row.split()[:7] == ["rest", "3", "3", "ms", f"{100 * share:.1f}%", "█" * 10, "50%"]
    assert re.search(r"^token +\d+ +[\d.]+ ms +100% ", text, re.MULTILINE)
    assert re.search(rf"unattributed +\S+ µs +{100 * profile.unattributed_share:.1f}%", text)
    assert "this machine reads 1.0 GB/s, computes 8 GFLOP/s integers, 2 GFLOP/s floats" in text
    assert " ".join(text.split()).endswith(profile.bottleneck.sentence)


def test_units_and_bars():
    assert [seconds(s) for s in (2.5, 0.0123456, 5.67e-5, -1e-6)] == [
        "2.5 s", "12.35 ms", "56.7 µs", "-1.0 µs",
    ]  # fmt: skip
    assert bar_of(1) == bar_of(1.7) == "█" * 10
    assert bar_of(0.25) == "██▌"
    assert bar_of(0) == ""
