"""The search of ``tune.py``, which knows no device: coordinate descent over the constants of a
:class:`~headrace.cuda.tuning.Tuning`, each candidate timed between two timings of what it replaces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from headrace.cuda.tuning import Tuning
from headrace.errors import DeviceError

WORSE = 0.005
"""What a candidate may cost any figure, relative; and what all that were taken may cost it."""
_SWEEPS = 3

OUT_OF_TIME, NOTHING_ELSE = "out of time", "launches nothing else here"


class Figure(NamedTuple):
    """What is timed: ``kind`` is decode (``size``: the depth), rows (how many) or prompt (of how
    many tokens)."""

    model: str
    kind: str
    size: int

    def __str__(self) -> str:
        what = {"decode": "decode at {:,}", "rows": "{:,} sequences", "prompt": "prompt of {:,}"}
        return f"{self.model}, {what[self.kind].format(self.size)}"


class Bench(Protocol):
    def plan(self, tuning: Tuning, figure: Figure) -> Hashable:
        """All that a figure would launch. DeviceError if it cannot."""

    def prepare(self, work: Sequence[tuple[Tuning, Figure]]) -> None:
        """Compile what it takes, in parallel."""

    def samples(self, tuning: Tuning, figure: Figure, *, again: bool = False) -> list[float]:
        """Microseconds, ten or more. ``again``: of a second instance of the same. DeviceError if
        there is no room for it."""


@dataclass(frozen=True)
class Measured:
    """A figure, in microseconds: of the baseline, of the candidate, of the baseline again."""

    figure: Figure
    before: Sequence[float]
    candidate: Sequence[float]
    after: Sequence[float]

    @property
    def baseline(self) -> float:
        return float(np.median([*self.before, *self.after]))

    @property
    def gain(self) -> float:
        """Relative; above zero the candidate is faster."""
        return 1 - float(np.median(self.candidate)) / self.baseline

    @property
    def spread(self) -> float:
        """Between the quartiles, relative: of the candidate, or of both baselines, which holds
        what drifted meanwhile."""
        ranges = (
            np.subtract(*np.percentile(some, [75, 25]))
            for some in ([*self.before, *self.after], self.candidate)
        )
        return float(max(ranges)) / self.baseline


@dataclass(frozen=True)
class Trial:
    """A candidate, against the value that it would have replaced, and what came of it."""

    constant: str
    value: Any
    against: Any
    verdict: str
    measured: Sequence[Measured] = ()

    @property
    def score(self) -> float:
        """The mean of the gains."""
        return float(np.mean([one.gain for one in self.measured])) if self.measured else 0.0


@dataclass
class Search:
    """What :func:`descend` did. ``control``: the start against itself, built a second time, whose
    differences a candidate must exceed, too. ``left_out``: figures that the start has no room for.
    """

    tuning: Tuning
    trials: list[Trial] = field(default_factory=list)
    control: dict[Figure, Measured] = field(default_factory=dict)
    left_out: dict[Figure, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def searched(self) -> list[str]:
        """The constants of which a candidate was timed, and none was left for want of time."""
        unfinished = {one.constant for one in self.trials if one.verdict == OUT_OF_TIME}
        names = dict.fromkeys(one.constant for one in self.trials if one.measured)
        return [name for name in names if name not in unfinished]


def judge(
    measured: Sequence[Measured], control: Mapping[Figure, Measured],
    taken: Mapping[Figure, float],
) -> str:  # fmt: skip
    """``better`` if some figure gains more than its spread and than the control differs, none
    loses more than ``WORSE``, and they gain on the whole. ``taken``: the time of each figure, of
    the start's, after what was taken before: small losses must not add up."""
    for one in sorted(measured, key=lambda one: one.gain):
        if one.gain < -WORSE:
            return f"worse: {one.figure} {-one.gain:.1%}"
        whole = taken[one.figure] * (1 - one.gain)
        if one.gain < 0 and whole > 1 + WORSE:
            return f"worse: {one.figure} {whole - 1:.1%} in all"
    beyond = [one for one in measured if one.gain > max(one.spread, abs(control[one.figure].gain))]
    better = beyond and sum(one.gain for one in measured) > 0
    return "better" if better else "no better"


def descend(
    bench: Bench, start: Tuning, candidates: Mapping[str, Sequence[Any]],
    figures: Sequence[Figure], *, seconds: float,
    clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = print,
) -> Search:  # fmt: skip
    """Take the best candidate of each constant in turn, and begin again while that changes
    anything. What would end after ``seconds`` is not begun."""
    return _Descent(bench, start, figures, seconds, clock, say).run(candidates)


class _OutOfTimeError(Exception):
    pass


class _Descent:
    def __init__(
        self, bench: Bench, start: Tuning, figures: Sequence[Figure], seconds: float,
        clock: Callable[[], float], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.bench, self.clock, self.say = bench, clock, say
        self.began = clock()
        self.deadline = self.began + seconds
        self.search = Search(start)
        self.figures = list(figures)
        self.took: dict[Figure, float] = {}
        self.preparing = 0.0
        self.known: dict[tuple[Tuning, Tuning], Trial] = {}
        self.taken: dict[Figure, float] = dict.fromkeys(figures, 1.0)

    def run(self, candidates: Mapping[str, Sequence[Any]]) -> Search:
        search = self.search
        self._control()
        for _ in range(_SWEEPS):
            before = search.tuning
            for name, values in candidates.items():
                self._constant(name, values)
            if search.tuning == before:
                break
        search.seconds = self.clock() - self.began
        return search

    def _control(self) -> None:
        search, now = self.search, self.search.tuning
        try:
            possible = []
            for figure in self.figures:
                try:
                    self.bench.plan(now, figure)
                    possible.append(figure)
                except DeviceError as cause:
                    self._leave_out(figure, cause)
            self.bench.prepare([(now, figure) for figure in possible])
            for figure in possible:
                begin = self.clock()
                if begin >= self.deadline:
                    raise _OutOfTimeError
                try:
                    search.control[figure] = self._between(now, now, figure)
                except DeviceError as cause:
                    self._leave_out(figure, cause)
                self.took[figure] = self.clock() - begin
        except _OutOfTimeError:
            self.say("out of time before everything was measured once")
        self.figures = list(search.control)

    def _leave_out(self, figure: Figure, cause: DeviceError) -> None:
        self.search.left_out[figure] = str(cause)
        self.say(f"{figure}: left out: {cause}")

    def _between(self, now: Tuning, candidate: Tuning, figure: Figure) -> Measured:
        before = self.bench.samples(now, figure)
        middle = self.bench.samples(candidate, figure, again=candidate == now)
        return Measured(figure, before, middle, self.bench.samples(now, figure))

    def _constant(self, name: str, values: Sequence[Any]) -> None:
        """Try its candidates, and take the best of those that are better."""
        now = self.search.tuning
        against, todo = getattr(now, name), []
        for value in values:
            option = replace(now, **{name: value})
            if option == now or (now, option) in self.known:
                continue
            try:
                changed = self._changed(now, option)
            except DeviceError as cause:
                self._note(now, option, Trial(name, value, against, f"does not fit: {cause}"))
                continue
            if changed:
                todo.append((value, option, changed))
            else:
                verdict = NOTHING_ELSE if self.figures else OUT_OF_TIME
                self._note(now, option, Trial(name, value, against, verdict))
        ready = self._prepare([(option, one) for _, option, changed in todo for one in changed])
        for value, option, changed in todo:
            self._note(now, option, self._try(name, value, now, option, changed, ready))
        tried = [self.known.get((now, replace(now, **{name: value}))) for value in values]
        better = [one for one in tried if one and one.verdict == "better"]
        if better:
            best = max(better, key=lambda one: one.score)
            self.search.tuning = replace(now, **{name: best.value})
            for one in best.measured:
                self.taken[one.figure] *= 1 - one.gain
            self.say(f"{name}: {against} -> {best.value}")

    def _changed(self, now: Tuning, option: Tuning) -> list[Figure]:
        """The figures that it can change: those that launch something else."""
        plan = self.bench.plan
        return [one for one in self.figures if plan(option, one) != plan(now, one)]

    def _prepare(self, work: Sequence[tuple[Tuning, Figure]]) -> bool:
        """False if there is no time for it."""
        begin = self.clock()
        if begin + self.preparing >= self.deadline:
            return False
        self.bench.prepare(work)
        self.preparing = max(self.preparing, self.clock() - begin)
        return True

    def _try(
        self, name: str, value: Any, now: Tuning, option: Tuning, changed: Sequence[Figure],
        ready: bool,
    ) -> Trial:  # fmt: skip
        measured: list[Measured] = []
        against = getattr(now, name)
        for figure in changed:
            if not ready or self.clock() + self.took[figure] > self.deadline:
                return Trial(name, value, against, OUT_OF_TIME, measured)
            try:
                measured.append(self._between(now, option, figure))
            except DeviceError as cause:
                return Trial(name, value, against, f"does not fit: {cause}", measured)
        return Trial(
            name, value, against, judge(measured, self.search.control, self.taken), measured
        )

    def _note(self, now: Tuning, option: Tuning, trial: Trial) -> None:
        self.known[now, option] = trial
        self.search.trials.append(trial)
        self.say(line(trial))


def line(trial: Trial) -> str:
    """One of the table's: the constant, what was tried for what, the mean and the best gain."""
    gains = [one.gain for one in trial.measured]
    found = f"{trial.score:+7.2%} {max(gains):+7.2%}" if gains else " " * 15
    return (
        f"{trial.constant:16} {trial.against!s:>6} -> {trial.value!s:<6} {found}  {trial.verdict}"
    )
