"""Tiny decoders, and a fake runner whose clock the profiler sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from profile_fakes import SUBJECT, FakeRunner
from tiny_families import tiny_model, write_tiny

from headrace.gguf import open_gguf
from headrace.instrument import Part
from headrace.model import load_decoder
from headrace.model.decoder import Decoder
from headrace.profile import measure
from headrace.profile.measure import profile_runner
from headrace.profile.result import Profile


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    folder = tmp_path_factory.mktemp("tiny")

    def load(name: str) -> Decoder:
        return load_decoder(open_gguf(write_tiny(tiny_model(name), folder / f"{name}.gguf")))

    return load


@pytest.fixture
def fake(
    tiny_decoder: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., FakeRunner]:
    def make(seconds: Callable[[Part], float] = lambda part: 1.0, name: str = "llama"):
        runner = FakeRunner(tiny_decoder(name), seconds)
        monkeypatch.setattr(measure.time, "perf_counter", runner.now)
        return runner

    return make


@pytest.fixture
def profiled() -> Callable[..., Profile]:
    def run(runner: FakeRunner, **options: int) -> Profile:
        return profile_runner(runner, SUBJECT, **options)

    return run
