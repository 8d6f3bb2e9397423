"""``headrace.load`` on a GPU that is a fake: its context is made beside the rest, and not kept when
the rest fails."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path
from typing import ClassVar

import pytest

import headrace
from headrace.cuda import context, gpu
from headrace.cuda.host import HostDevice
from headrace.errors import DeviceError, GGUFError
from headrace.gguf import reader
from headrace.synth import write_synthetic


class FakeContext:
    """Counts those that are kept. Begins before the file is opened, and ends after that."""

    kept = 0
    begun: ClassVar[threading.Event]
    file_opened: ClassVar[threading.Event]

    def __init__(self, index: int = 0) -> None:
        self.begun.set()
        assert self.file_opened.wait(30)
        FakeContext.kept += 1

    def close(self) -> None:
        FakeContext.kept -= 1


class FakeGPU(HostDevice):
    def __init__(self) -> None:
        super().__init__()
        self.context = FakeContext()

    def close(self) -> None:
        super().close()
        self.context.close()


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_gguf(path: Path) -> object:
        try:
            assert FakeContext.begun.wait(30)
            return opened(path)
        finally:
            FakeContext.file_opened.set()

    opened = reader.open_gguf
    monkeypatch.setattr(reader, "open_gguf", open_gguf)
    for event in ("begun", "file_opened"):
        monkeypatch.setattr(FakeContext, event, threading.Event(), raising=False)
    monkeypatch.setattr(context, "has_driver", lambda: True)
    monkeypatch.setattr(context, "CUDAContext", FakeContext)
    monkeypatch.setattr(gpu, "CUDADevice", FakeGPU)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_synthetic(path, "llama-tiny", "Q8_0")
    return path


def test_a_context_is_made_while_the_file_is_opened(path: Path) -> None:
    with headrace.load(path, "cuda", context=128, max_sequences=1) as model:
        assert FakeContext.kept == 1  # the device's own
        assert len(model.generate([1, 2], max_tokens=3, ignore_eos=True).tokens) == 3
    assert FakeContext.kept == 0


def test_a_file_that_is_none_leaves_no_context(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"something else")
    with pytest.raises(GGUFError):
        headrace.load(tmp_path / "other.gguf", "cuda")
    assert FakeContext.kept == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("headrace-device")]


def test_why_there_is_no_context_is_said(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def fail(*_: object) -> None:
        raise DeviceError("the GPU has fallen off the bus")

    FakeContext.begun.set()
    monkeypatch.setattr(FakeContext, "__init__", fail)
    with pytest.raises(DeviceError, match="fallen off the bus"):
        headrace.load(path, "cuda")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_rests_meanwhile(
    monkeypatch: pytest.MonkeyPatch, path: Path, tmp_path: Path, enabled: bool
) -> None:
    def open_gguf(path: Path) -> object:
        assert not gc.isenabled()
        return opened(path)

    other = tmp_path / "other.gguf"
    other.write_bytes(b"something else")
    opened = reader.open_gguf
    monkeypatch.setattr(reader, "open_gguf", open_gguf)
    try:
        (gc.enable if enabled else gc.disable)()
        with headrace.load(path, "cuda", context=64):
            assert gc.isenabled() is enabled
        with pytest.raises(GGUFError):
            headrace.load(other, "cuda")
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_a_cpu_needs_no_context(path: Path) -> None:
    FakeContext.begun.set()
    with headrace.load(path, "reference", context=128):
        assert FakeContext.kept == 0


def test_what_a_load_took_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "headrace.stages"), headrace.load(path, "cuda", context=64):
        pass
    facts = {record.getMessage(): record.facts for record in caplog.records}
    assert facts.keys() == {
        "header", "vocabulary", "tokeniser's encoder", "decoder", "context", "bindings imported",
        "load", "device opened, its context waited for", "matrices on the device", "runner",
        "cache",
    }  # fmt: skip
    size = path.stat().st_size
    assert 0.9 * size < facts["matrices on the device"]["bytes"] < size
    runner, matrices = facts["runner"]["seconds"], facts["matrices on the device"]["seconds"]
    assert runner >= matrices > 0


def test_what_failed_took_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "other.gguf").write_bytes(b"something else")
    with caplog.at_level(logging.DEBUG, "headrace.stages"), pytest.raises(GGUFError):
        headrace.load(tmp_path / "other.gguf", "cuda")
    assert {record.getMessage() for record in caplog.records} == {"context", "bindings imported"}
