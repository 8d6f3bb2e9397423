"""A profile as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.profile.record import Group, Level
from headrace.profile.result import Profile

if TYPE_CHECKING:
    from collections.abc import Iterator

_COLOURS = {Level.MACRO: "cyan", Level.MIDI: "yellow", Level.MICRO: "magenta"}
_CAUSES = {"host": "red", "gaps": "red", "memory": "cyan", "compute": "yellow"}
WIDE = 100
"""Columns that hold everything; narrower tables do without counts, bars and intensities."""

_BAR = 10


def show(profile: Profile, console: Console) -> None:
    """Print the whole profile."""
    for line in _heading(profile):
        console.print(line, highlight=False)
    console.print()
    console.print(_table(profile, wide=console.width >= WIDE))
    console.print()
    found = profile.bottleneck
    sentence = Text(found.sentence)
    sentence.stylize(f"bold {_CAUSES[found.cause]}", 0, found.sentence.index(":"))
    console.print(sentence)


def _heading(profile: Profile) -> Iterator[str]:
    s, ceilings = profile.subject, profile.ceilings
    yield f"[bold]{s.model}[/bold] · {s.architecture} · {s.device}"
    what = profile.unit + ("s" if profile.plain.count > 1 else "")
    what += f" of {profile.n_tokens} tokens" if profile.mode == "prefill" else ""
    each = f"{seconds(profile.plain.median)} each, {profile.tokens_per_second:,.0f} tok/s"
    yield (
        f"{profile.mode} of {profile.plain.count} {what} at depth {profile.depth}: {each}; "
        f"with time stamps {seconds(profile.seconds.median)} ({profile.overhead_share:+.1%})"
    )
    can = [
        f"{flops / 1e9:,.0f} GFLOP/s {name}" for name, flops in ceilings.flops_per_second.items()
    ]
    reads = f"{ceilings.bytes_per_second / 1e9:,.1f} GB/s"
    yield f"this machine reads {reads}, computes {', '.join(can)}"


def _table(profile: Profile, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("operation", no_wrap=True)
    table.add_column("part")  # the one that may break: kernels of a GPU do many works
    for heading in (*(["times"] if wide else []), "time", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True, min_width=_BAR)
    for heading in ("wait", "GB/s", "GFLOP/s", *(["FLOP/B"] if wide else []), "roof"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = profile.seconds.mean
    largest = max(group.seconds.mean for group in profile.parts) / total
    last = ""
    for group in profile.parts:
        first = group.first
        operation = "" if first.operation == last else first.operation
        name = Text(first.name, _COLOURS[first.level])
        table.add_row(operation, name, *_cells(profile, group, largest, wide))
        last = first.operation
    lost = profile.unattributed_share
    times = [""] if wide else []
    table.add_row("", Text("unattributed", "dim"), *times, seconds(lost * total), f"{lost:.1%}")
    table.add_row()
    for group in profile.levels:
        name = Text(group.name, f"bold {_COLOURS[group.first.level]}")
        table.add_row(name, "", *_cells(profile, group, 1.0, wide))
    whole = [Text(profile.unit, "bold"), "", *_cells(profile, profile.total, 1.0, wide)]
    at = 2 + len(times)
    whole[at : at + 2] = [seconds(total), "100%"]
    table.add_row(*whole)
    return table


def _cells(profile: Profile, group: Group, largest: float, wide: bool) -> list[Text | str]:
    """``largest``: the share that a full bar shows."""
    share = group.seconds.mean / profile.seconds.mean
    bar = Text(bar_of(share / largest), _COLOURS[group.first.level])
    waiting = group.waiting.mean / group.seconds.mean if group.seconds.mean else 0.0
    cost = group.cost
    return [
        *([str(len(group.records))] if wide else []),
        seconds(group.seconds.mean),
        f"{share:.1%}",
        *([bar] if wide else []),
        "" if group.host else f"{waiting:.0%}",
        f"{group.bytes_per_second / 1e9:.1f}",
        f"{group.flops_per_second / 1e9:.1f}",
        *([f"{cost.intensity:.2f}"] if wide else []),
        f"{group.roofline_share(profile.ceilings):.0%}",
    ]


def bar_of(share: float) -> str:
    """Of ``_BAR`` columns, in eighths."""
    eighths = round(8 * _BAR * min(max(share, 0.0), 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def seconds(value: float) -> str:
    """``1.234 ms``, ``56.7 µs``: four digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e6:.1f} µs"
