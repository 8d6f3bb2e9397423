"""Steps timed kernel by kernel: the same step, and every kernel accounted for once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest

from headrace.cuda.device import Device
from headrace.cuda.executor import Executor
from headrace.cuda.runner import CUDARunner
from headrace.cuda.stamps import DOTS, TENSORS, Stamps
from headrace.gguf.reader import open_gguf
from headrace.instrument import InstrumentedRunner, Part, Work, works
from headrace.model.loader import load_decoder
from headrace.model.operations import Head
from headrace.profile.layer import profile_layer
from headrace.profile.record import Level
from headrace.synth import write_synthetic

TOKENS = [5, 9, 301, 44, 17]


@pytest.mark.parametrize(
    ("shape", "one_kernel"),
    [("llama-tiny", False), ("llama-tiny", True), ("qwen3-tiny", False), ("gemma3-tiny", False)],
)
def test_timed_steps_are_steps(
    device: Device, tmp_path: Path, shape: str, one_kernel: bool
) -> None:
    write_synthetic(tmp_path / "m.gguf", shape, "Q8_0")
    runner = CUDARunner(
        load_decoder(open_gguf(tmp_path / "m.gguf")), device, max_rows=8, one_kernel=one_kernel
    )
    assert isinstance(runner, InstrumentedRunner)
    runner.allocate_cache(2)
    instrument = runner.instrument()
    prompt = batches.one_sequence(TOKENS, 0, [4])
    wanted = int(runner.step(prompt)[0].argmax())

    def step(timed: bool, batch) -> int | None:
        instrument.prepare(batch)
        return instrument.timed_step(batch) if timed else instrument.plain_step(batch)

    assert step(False, prompt) == step(True, prompt) == wanted
    spans = instrument.spans()
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert all(0 <= span.waiting <= span.end - span.start for span in spans)
    assert spans[-1].end > spans[0].start
    # The works of each operation, once each, in its kernels.
    for i, op in enumerate(runner.decoder.operations):
        done = [w for span in spans if span.part.operation == i for w in span.part.works]
        assert tuple(w for w in done if w is not Work.QUANTISE) == works(op)
    # Without logits the vocabulary is left out.
    assert step(True, batches.one_sequence(TOKENS, 0, [])) is None
    assert not any(
        isinstance(runner.decoder.operations[span.part.operation], Head)
        for span in instrument.spans()
    )
    decoded = batches.one_sequence([wanted], 5, [0])
    assert step(True, decoded) == int(runner.step(decoded)[0].argmax())
    spans = instrument.spans()
    assert [s.part.operation for s in spans][-1] == len(runner.decoder.operations) - 1
    assert {s.part.operation for s in spans} == set(range(len(runner.decoder.operations)))
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
    runner.close()


def test_stamps_are_told_to_the_nanosecond(device: Device) -> None:
    """Of a clock that counts from 1970: as seconds, doubles are 0.2 µs apart there."""
    stamps = Stamps(device, 3)
    now, marks = 1_795_000_000_000_000_123, [(0, 700), (737, 1500), (1537, 2001)]
    part = Part(0, "part", (Work.NORM,), DOTS)
    for shift in (0, 5_000_000_000):
        noted = [(~np.uint64(now + shift + a), np.uint64(now + shift + b)) for a, b in marks]
        device.upload(stamps._array.address, np.array(noted, np.uint64))
        spans = stamps.spans([[part]] * 3)
        taken = [(round((s.end - s.start) * 1e9), round(s.waiting * 1e9)) for s in spans]
        assert taken == [(700, 0), (800, 37), (501, 37)]
        assert spans[0].start == pytest.approx(shift / 1e9)
    stamps.close()


@pytest.mark.parametrize(
    ("options", "arithmetic"),
    [({}, DOTS), ({"tensor_rows": 4}, TENSORS), ({"few_rows": range(2, 17)}, TENSORS)],
)
def test_a_layer_timed_is_the_layer(
    device: Device, tmp_path: Path, options: dict[str, Any], arithmetic: str
) -> None:
    write_synthetic(tmp_path / "m.gguf", "llama-tiny", "Q4_K_M")
    executor = Executor(
        load_decoder(open_gguf(tmp_path / "m.gguf")), device, max_rows=16, **options
    )
    executor.allocate_cache(1)
    executor.bring(batches.one_sequence([0] * 4))
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    wanted = executor.download(executor.layer(executor.upload(x), 1))
    spans = executor.time_layer(executor.upload(x), 1)
    assert {s.part.arithmetic for s in spans if Work.MATMUL in s.part.works} == {arithmetic}
    group = profile_layer(executor, x, 1, repetitions=3)
    again = executor.lowering.arena["x values"]
    np.testing.assert_array_equal(executor.download(again)[:4], wanted)
    assert [record.level for record in group.records] == [
        Level.MACRO, Level.MIDI, Level.MACRO, Level.MACRO, Level.MACRO,
    ]  # fmt: skip
    assert group.seconds.count == 3
    assert group.seconds.min > 0
    weights = [t for name, t in executor.decoder.weights.items() if name.startswith("blk.1.")]
    assert group.cost.weight_bytes == sum(tensor.n_bytes for tensor in weights)
    assert group.cost.flops > 2 * 4 * sum(t.n_rows * t.k for t in weights if t.n_rows > 1)
    executor.close()
