"""bench/tune.py: the search over planted times, and its bench on the host device."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Hashable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from headrace.cuda.host import HostDevice
from headrace.cuda.tuning import ALLOWED, DEFAULTS, Tuning, read_records
from headrace.errors import DeviceError, DeviceMemoryError
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.synth import Shape, write_synthetic

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def descent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("descent")


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("tune")


class FakeBench:
    """Times that ``us`` gives for (tuning, figure), each timing of a figure two seconds long, with
    1 % of noise between its quartiles, and a machine that gets slower by ``drift`` each time."""

    def __init__(
        self, us: Callable[[Tuning, Any], float], reads: dict[str, set[str]], *,
        noise: float = 0.01, drift: float = 0.0, room: Callable[[Tuning], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        self.us, self.reads, self.room = us, reads, room
        self.noise, self.drift, self.slower = noise, drift, 1.0
        self.rng = np.random.default_rng(0)
        self.now = 0.0
        self.order: list[tuple[Tuning, str]] = []

    def clock(self) -> float:
        return self.now

    def plan(self, tuning: Tuning, figure: Any) -> Hashable:
        if not self.room(tuning):
            raise DeviceError("no room")
        return tuple(getattr(tuning, name) for name in sorted(self.reads[figure.kind]))

    def prepare(self, work: Any) -> None:
        self.now += 1.0 if work else 0.0

    def samples(self, tuning: Tuning, figure: Any, *, again: bool = False) -> list[float]:
        self.now += 2.0
        self.order.append((tuning, figure.kind))
        self.slower *= 1 + self.drift
        levels = np.linspace(-self.noise, self.noise, 11)  # their quartiles are `noise` apart
        jitter = 1 + self.rng.permutation(levels)
        return [float(x) for x in self.us(tuning, figure) * self.slower * jitter]


READS = {
    "decode": {"matvec_warps", "matvec_stages", "attend_split"},
    "prompt": {"prompt_rows", "attend_split"},
}
CANDIDATES = {
    "matvec_warps": (8, 16, 24), "matvec_stages": (1, 2, 3), "attend_split": (128, 256, 512),
    "prompt_rows": (1024, 2048),
}  # fmt: skip


def search(descent: ModuleType, bench: FakeBench, seconds: float = 1e6, **how: Any) -> Any:
    figures = [descent.Figure("m", "decode", 0), descent.Figure("m", "prompt", 4096)]
    return descent.descend(
        bench, how.get("start", DEFAULTS), how.get("candidates", CANDIDATES), figures,
        seconds=seconds, clock=bench.clock, say=lambda text: None,
    )  # fmt: skip


def verdicts(found: Any) -> dict[tuple[str, Any], str]:
    return {(one.constant, one.value): one.verdict for one in found.trials}


def test_the_planted_best_is_found(descent: ModuleType) -> None:
    """Also that of a constant whose best shows only when a later one has changed."""

    def us(tuning: Tuning, figure: Any) -> float:
        if figure.kind == "prompt":
            return 1000.0
        best = {8: 0.90, 16: 1.0, 24: 1.1} if tuning.matvec_stages == 3 else {8: 1.2, 24: 1.1}
        stages = {1: 1.05, 2: 1.0, 3: 0.95}[tuning.matvec_stages]
        return 100 * stages * best.get(tuning.matvec_warps, 1.0)

    bench = FakeBench(us, READS)
    found = search(descent, bench)
    assert found.tuning == replace(DEFAULTS, matvec_stages=3, matvec_warps=8)
    assert found.searched == list(CANDIDATES)
    # The baseline is timed before and after each candidate.
    decodes = [tuning for tuning, kind in bench.order if kind == "decode"]
    for i in range(3, len(decodes), 3):
        before, candidate, after = decodes[i : i + 3]
        assert before == after != candidate
    # Each pair of baseline and candidate once, and only figures that the constant can change.
    pairs = list(zip(decodes[3::3], decodes[4::3], strict=False))
    assert len(pairs) == len(set(pairs))
    for one in found.trials:
        kinds = {m.figure.kind for m in one.measured}
        assert kinds == {kind for kind in READS if one.constant in READS[kind]}


@pytest.mark.parametrize("drift", [0.0, 0.002])
def test_differences_within_the_noise_change_nothing(descent: ModuleType, drift: float) -> None:
    """Nor do those of a machine that gets slower, for which the baseline's mean stands."""

    def us(tuning: Tuning, figure: Any) -> float:
        return 100 * (1 if tuning == DEFAULTS else 0.992)  # quartiles are 1 % apart

    found = search(descent, FakeBench(us, READS, drift=drift))
    assert found.tuning == DEFAULTS
    assert {one.verdict for one in found.trials} == {"no better"}
    steady = search(descent, FakeBench(us, READS, noise=0.003))
    assert steady.tuning != DEFAULTS


def test_the_spread_is_of_the_worse_of_both(descent: ModuleType) -> None:
    figure, steady = descent.Figure("m", "decode", 0), [96.0] * 10
    moved = descent.Measured(figure, [100.0] * 10, steady, [104.0] * 10)
    assert (moved.baseline, moved.spread) == (102, 4 / 102)  # what drifted meanwhile
    wide = descent.Measured(figure, [100.0] * 10, [90.0, 98.0, 98.0, 106.0], [100.0] * 10)
    assert (wide.gain, wide.spread) == (pytest.approx(0.02), pytest.approx(0.04))
    judged = descent.judge([moved], {figure: moved}, {figure: 1.0})
    assert judged == "no better"
    control = descent.Measured(figure, [100.0] * 10, [100.0] * 10, [100.0] * 10)
    assert descent.judge([wide], {figure: control}, {figure: 1.0}) == "no better"
    sharp = descent.Measured(figure, [100.0] * 10, [98.0] * 10, [100.0] * 10)
    assert descent.judge([sharp], {figure: control}, {figure: 1.0}) == "better"


def test_the_same_built_twice_must_differ_less(descent: ModuleType) -> None:
    """What another place in memory does is no merit of a candidate."""

    class Placed(FakeBench):
        def samples(self, tuning: Tuning, figure: Any, *, again: bool = False) -> list[float]:
            us = super().samples(tuning, figure)
            return [x * 0.96 for x in us] if again else us

    def us(tuning: Tuning, figure: Any) -> float:
        return 100 * (1 if tuning == DEFAULTS else 0.97)

    assert search(descent, FakeBench(us, READS, noise=1e-3)).tuning != DEFAULTS
    assert search(descent, Placed(us, READS, noise=1e-3)).tuning == DEFAULTS


def test_what_makes_another_figure_worse_loses(descent: ModuleType) -> None:
    def us(tuning: Tuning, figure: Any) -> float:
        faster, slower = {128: (0.8, 1.007), 256: (1, 1), 512: (0.9, 1.003)}[tuning.attend_split]
        return 100 * (faster if figure.kind == "decode" else slower)

    found = search(descent, FakeBench(us, READS, noise=1e-4))
    assert found.tuning == replace(DEFAULTS, attend_split=512)
    first = {one.value: one for one in reversed(found.trials) if one.constant == "attend_split"}
    assert first[128].verdict == "worse: m, prompt of 4,096 0.7%"
    assert first[512].verdict == "better"
    # 128 is little worse than 512, and too much worse than the start.
    last = {one.value: one for one in found.trials if one.constant == "attend_split"}
    assert last[128].against == 512
    assert last[128].verdict == "worse: m, prompt of 4,096 0.7% in all"


@pytest.mark.parametrize("seconds", [0, 10, 13, 20, 37, 60])
def test_the_time_is_a_bound(descent: ModuleType, seconds: float) -> None:
    """Compiling takes one second and a figure six; what was not judged is said."""
    bench = FakeBench(lambda tuning, _: 100.0 if tuning == DEFAULTS else 50.0, READS)
    found = search(descent, bench, seconds)
    # What is timed once, at first, may have been begun before the end.
    assert bench.now <= max(seconds, 13) + 1
    tried = verdicts(found)
    assert {key for key, verdict in tried.items() if verdict == "out of time"}
    assert {constant for constant, _ in tried} == set(CANDIDATES)
    for name in found.searched:
        assert all(v != "out of time" for (constant, _), v in tried.items() if constant == name)
    assert set(found.searched) < set(CANDIDATES)
    if seconds == 60:
        assert found.searched
    for name in set(CANDIDATES) - set(found.searched) - {"matvec_warps", "matvec_stages"}:
        assert getattr(found.tuning, name) == getattr(DEFAULTS, name)


def test_what_does_not_fit_is_reported(descent: ModuleType) -> None:
    class Full(FakeBench):
        def samples(self, tuning: Tuning, figure: Any, *, again: bool = False) -> list[float]:
            if tuning.attend_split == 128:
                raise DeviceMemoryError("workspace: 9 bytes wanted, 1 free")
            return super().samples(tuning, figure, again=again)

    bench = Full(lambda *_: 100.0, READS, room=lambda tuning: tuning.matvec_warps < 24)
    found = search(descent, bench, candidates=CANDIDATES | {"tensor_rows": (4, 8)})
    tried = verdicts(found)
    assert tried["matvec_warps", 24] == "does not fit: no room"
    assert tried["attend_split", 128] == "does not fit: workspace: 9 bytes wanted, 1 free"
    assert tried["tensor_rows", 4] == "launches nothing else here"
    assert tried["matvec_warps", 8] == "no better"
    lines = [descent.line(one) for one in found.trials]
    assert any("matvec_warps" in one and "does not fit: no room" in one for one in lines)


def test_a_figure_without_room_is_left_out(descent: ModuleType) -> None:
    class Short(FakeBench):
        def samples(self, tuning: Tuning, figure: Any, *, again: bool = False) -> list[float]:
            if figure.kind == "prompt":
                raise DeviceMemoryError("KV cache: too large")
            return super().samples(tuning, figure, again=again)

    found = search(descent, Short(lambda t, _: float(100 + t.matvec_warps), READS))
    assert [str(one) for one in found.left_out] == ["m, prompt of 4,096"]
    assert found.tuning == replace(DEFAULTS, matvec_warps=8)
    assert verdicts(found)["prompt_rows", 1024] == "launches nothing else here"


def test_the_candidates_are_allowed(tune: ModuleType) -> None:
    assert set(tune.CANDIDATES) == set(ALLOWED)
    for name, values in tune.CANDIDATES.items():
        assert set(values) <= set(ALLOWED[name])
        assert getattr(DEFAULTS, name) in values
        assert 2 <= len(values) <= 5


def test_the_bench_on_a_device(
    tune: ModuleType, descent: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the speed: launches, samples, the receipt and the record."""
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, Shape("llama", 1, 256, 512, 4, 2, 64, 512, 2048, 5e5, 1e-5), "Q4_0")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "REPEATS", 3)
    monkeypatch.setattr(tune, "TOKENS", 2)
    device = HostDevice()
    bench = tune.DeviceBench(device, {"tiny": load_decoder(open_gguf(path))}, 300)
    figures = [
        descent.Figure("tiny", *one)
        for one in (("decode", 300), ("rows", 2), ("rows", 4), ("prompt", 20))
    ]
    other = replace(DEFAULTS, attend_split=128)
    changed = [one for one in figures if bench.plan(DEFAULTS, one) != bench.plan(other, one)]
    assert changed == figures[:3]
    few = replace(DEFAULTS, few_first=2)
    changed = [one for one in figures if bench.plan(DEFAULTS, one) != bench.plan(few, one)]
    assert changed == figures[1:2]

    candidates = {"attend_split": (128, 256), "tensor_rows": (4, 8)}
    found = tune.descend(bench, DEFAULTS, candidates, figures, seconds=600, say=lambda _: None)
    assert found.searched == ["attend_split"]
    assert verdicts(found)["tensor_rows", 4] == "launches nothing else here"
    (trial,) = [one for one in found.trials if (one.constant, one.against) == ("attend_split", 256)]
    assert [one.figure for one in trial.measured] == figures[:3]
    for one in [*trial.measured, *found.control.values()]:
        assert len(one.before) == len(one.candidate) == len(one.after) == 3
        assert min(one.before) > 0
    assert len(bench._runners) == 2  # a baseline and a candidate, never more

    receipt = json.loads(json.dumps(tune.report(found, DEFAULTS)))
    assert receipt["constants"] == asdict(found.tuning)
    assert [one["kind"] for one in receipt["control"]] == ["decode", "rows", "rows", "prompt"]
    tune.print_table(found, DEFAULTS)
    target = tmp_path / "tuned.json"
    about = {"device": "Abacus", "time": "2026-01-02T03:04:05Z", "commit": "c", "command": "d"}
    tune.update(target, found, about)
    records = read_records(target)
    assert records["Abacus"].tuning == found.tuning
    assert records["Abacus"].date == "2026-01-02"
    assert records["Abacus"].searched == ("attend_split",)
    assert "NVIDIA H100 80GB HBM3" in records

    closed: list[int] = []
    monkeypatch.setattr(device, "close", lambda: closed.append(device.free_bytes()))
    bench.close()
    assert closed == [HostDevice().free_bytes()]
