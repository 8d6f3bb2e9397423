"""What the device holds: planned before, counted after, and not growing with use."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fake_runner import TOKENIZER, add, drain
from tiny_families import tiny_model, write_tiny

from headrace import devices
from headrace.backend import DecodeRow
from headrace.cuda.device import Device
from headrace.cuda.host import HostDevice
from headrace.cuda.memory import plan
from headrace.cuda.runner import CUDARunner, best_options
from headrace.cuda.tuning import DEFAULTS
from headrace.engine.engine import Engine
from headrace.errors import DeviceError, RequestError
from headrace.gguf.reader import open_gguf
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.sampling import SamplingParams
from headrace.synth import Shape, write_synthetic

GREEDY = SamplingParams(temperature=0)
LONG = Shape("llama", 2, 256, 512, 4, 2, 64, 512, 16384, 5e5, 1e-5)


@pytest.fixture(scope="module")
def long_decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    write_synthetic(path, LONG, "Q4_K_M")
    return load_decoder(open_gguf(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load_decoder(open_gguf(write_tiny(tiny_model("llama"), path)))


@pytest.mark.parametrize(("cache_type", "half_bytes"), [("f16", 4), ("q8_0", 2 + 1 / 8)])
def test_the_plan_is_what_is_taken(
    long_decoder: Decoder, cache_type: str, half_bytes: float
) -> None:
    device = HostDevice()
    planned = dict(plan(long_decoder, device, 1024, max_rows=16, cache_type=cache_type))
    options = best_options(device)
    runner = CUDARunner(long_decoder, device, max_rows=16, cache_type=cache_type, **options)
    runner.allocate_cache(16)
    next(runner.decode([DecodeRow([1], [0], 1, GREEDY, 0)], 1))
    taken = sum(n_bytes for _, n_bytes in runner.memory_plan())
    total = sum(planned.values()) - planned["staging, while loading"]
    assert taken <= total <= 1.01 * taken  # arrays begin at multiples of 256 bytes
    cached = 16 * 64 * 2 * 2 * 64 * half_bytes
    inputs = DEFAULTS.prompt_rows * (3 + 16) * 4  # token, position, slot, and pages of each row
    assert cached <= planned["KV cache of 16 pages"] <= cached + inputs + 1024
    runner.close()


@pytest.mark.timeout(600)
def test_a_long_decode_and_cancelled_ones_leave_memory_and_text_as_they_were(
    device: Device, long_decoder: Decoder
) -> None:
    on_gpu = not isinstance(device, HostDevice)
    n_tokens, n_cancelled = (10_000, 200) if on_gpu else (70, 3)
    runner = CUDARunner(long_decoder, device, max_rows=4)
    n_pages = n_tokens // 64 + 8
    engine = Engine(runner, TOKENIZER, context=64 * n_pages)

    def text() -> list[int]:
        done = add(engine, [5, 6, 7], max_tokens=20, sampling=GREEDY, ignore_eos=True)
        drain(engine)
        return done.generated

    def long() -> list[int]:
        row = DecodeRow([5], list(range(n_pages)), 1, GREEDY, 0)
        return [choices[0].token for choices in runner.decode([row], n_tokens)]

    def cancelled(count: int) -> None:
        for i in range(count):
            sequence = add(engine, [3, 4, i % 500], max_tokens=40, ignore_eos=True)
            for _ in range(1 + i % 7):
                engine.step()
            engine.cancel(sequence)
        drain(engine)

    before, first = text(), long()  # compiles, and captures a graph for each length
    cancelled(min(n_cancelled, 14))
    free = device.free_bytes()
    assert long() == first
    cancelled(n_cancelled)
    assert engine.pool.n_held == 0
    assert text() == before
    assert device.free_bytes() == free
    engine.close()


def test_auto_takes_a_gpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_gpu_name", lambda: "NVIDIA Abacus")
    with caplog.at_level(logging.WARNING):
        assert devices.choose_device("auto") == "cuda"
    assert "using NVIDIA Abacus; --device cpu" in caplog.text
    caplog.clear()
    assert devices.choose_device("auto", threads=2) == "cpu"
    monkeypatch.setattr(devices, "_gpu_name", lambda: None)
    assert devices.choose_device("auto") == "cpu"
    assert not caplog.text
    with pytest.raises(DeviceError, match="threads are the CPU's"):
        devices.choose_device("cuda", threads=2)
    with pytest.raises(DeviceError, match="unknown device 'tpu'"):
        devices.choose_device("tpu")


def test_an_engine_of_more_sequences_than_rows_still_answers(tiny: Decoder) -> None:
    """Bursts hold as many rows as the runner; steps of more go in passes."""
    runner = CUDARunner(tiny, HostDevice(), max_rows=2)
    engine = Engine(runner, TOKENIZER, context=64, n_pages=8, max_sequences=3)
    asked = [add(engine, [3 + i], max_tokens=3, ignore_eos=True) for i in range(3)]
    drain(engine)
    together = [one.generated for one in asked]
    alone = []
    for i in range(3):
        one = add(engine, [3 + i], max_tokens=3, ignore_eos=True)
        drain(engine)
        alone.append(one.generated)
    assert together == alone
    engine.close()


def test_only_a_gpu_quantises_its_cache(tiny: Decoder) -> None:
    with pytest.raises(DeviceError, match=r"leave out --cache-type q8_0 .*--device cuda"):
        devices.load_runner(tiny, "cpu", cache_type="q8_0")
    with pytest.raises(RequestError, match="cache_type must be one of f16, q8_0, not 'q4_0'"):
        devices.load_runner(tiny, "cuda", cache_type="q4_0")


def test_a_plan_needs_a_gpu(tmp_path: Path, tiny: Decoder) -> None:
    with pytest.raises(DeviceError, match="no memory plan for the device 'cpu'"):
        devices.memory_plan(tiny, "cpu", 64)
