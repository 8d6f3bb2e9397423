"""Timing on a machine that others use too: whether a bad figure can be blamed on them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

BUSY = 0.05
"""Share of the machine's CPU time in others' hands from which a bad figure may be their fault."""
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """User and system time of a process so far, or of one of its threads."""
    path = Path(f"/proc/{pid}/stat") if thread is None else Path(f"/proc/{pid}/task/{thread}/stat")
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _machine_seconds() -> tuple[float, float]:
    """CPU time of everything that runs here, and with what was idle. (proc_stat(5))"""
    user, nice, system, idle, wait, irq, soft, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    busy = user + nice + system + irq + soft + steal
    return busy / _TICKS, (busy + idle + wait) / _TICKS


class Watch:
    """``with Watch(pid) as watch: …``; then ``watch.others`` is the share of the machine's CPU time
    that went to processes other than this one and those named."""

    others = 0.0

    def __init__(self, *pids: int) -> None:
        self._pids = (os.getpid(), *pids)

    def __enter__(self) -> Self:
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        busy, whole, ours = (
            end - start for start, end in zip(self._start, self._now(), strict=True)
        )
        self.others = max(0.0, busy - ours) / max(whole, 1e-9)

    @property
    def busy(self) -> bool:
        return self.others >= BUSY

    def _now(self) -> tuple[float, float, float]:
        return *_machine_seconds(), sum(map(cpu_seconds, self._pids))


def reaches(
    attempt: Callable[[], bool], *pids: int, quiet_failures: int = 3, attempts: int = 6
) -> bool:
    """Whether ``attempt`` succeeds, of a few. One that fails counts only if others left the machine
    alone meanwhile: ``quiet_failures`` of those, and the answer is no. When others keep it busy the
    clock proves nothing, and the answer is yes: beside this, test what needs no clock.
    """
    n_quiet = 0
    for number in range(1, attempts + 1):
        with Watch(*pids) as watch:
            if attempt():
                return True
        print(f"attempt {number} failed; others had {100 * watch.others:.0f}% of the machine")
        n_quiet += not watch.busy
        if n_quiet == quiet_failures:
            return False
        time.sleep(0.2 * number)  # the compiler beside us may be done soon
    return True
