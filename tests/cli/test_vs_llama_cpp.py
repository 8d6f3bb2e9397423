"""bench/vs_llama_cpp.py: the ratios, and the conversation with a child, without llama.cpp."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/vs_llama_cpp.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vs_llama_cpp", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vs_llama_cpp", module)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_medians_and_the_engines_take_turns(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    # The first of each is the warm-up; 100 is an outlier that a median forgives.
    seconds = {"headrace": [9.0, 1.0, 100.0, 1.0], "llama.cpp": [9.0, 2.0, 2.0, 2.0]}

    class FakeChild:
        version = "1"

        def __init__(self, engine: str, *arguments: object) -> None:
            self.engine = engine
            self.asked = 0

        def seconds(self, test: object) -> float:
            order.append(self.engine)
            self.asked += 1
            return seconds[self.engine][(self.asked - 1) % 4]

        def close(self) -> None:
            pass

    monkeypatch.setattr(script, "Child", FakeChild)
    arguments = argparse.Namespace(threads=2, repetitions=3, pause=0.0, llama_python=None)
    tests = [script.Test("decode", 64, 16), script.Test("prefill", 128, 0)]
    report = script.compare("file", tests, arguments)
    assert report["decode_ratio"] == report["prefill_ratio"] == report["prefill_128_ratio"] == 2.0
    decode = report["tests"]["decode"]
    assert decode == {
        "tokens_per_second": {"headrace": [64.0, 0.64, 64.0], "llama.cpp": [32.0] * 3},
        "ratio": 2.0,
    }
    a, b = "headrace", "llama.cpp"
    assert order == [b, a, a, b, b, a, a, b] * 2


def test_a_child_answers_with_seconds(script: ModuleType, tiny: str) -> None:
    child = script.Child("headrace", sys.executable, tiny, 1, 128)
    try:
        for test in (script.Test("decode", 4, 16), script.Test("prefill", 100, 0)):
            assert 0 < child.seconds(test) < 60
    finally:
        child.close()
