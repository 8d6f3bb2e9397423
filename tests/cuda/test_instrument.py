"""Steps timed kernel by kernel: the same step, and every kernel accounted for once."""

from __future__ import annotations

from pathlib import Path

import batches
import pytest

from headrace.cuda.device import Device
from headrace.cuda.runner import CUDARunner
from headrace.gguf.reader import open_gguf
from headrace.instrument import InstrumentedRunner, Work, works
from headrace.model.loader import load_decoder
from headrace.model.operations import Head
from headrace.synth import write_synthetic

TOKENS = [5, 9, 301, 44, 17]


@pytest.mark.parametrize("shape", ["llama-tiny", "qwen3-tiny", "gemma3-tiny"])
def test_timed_steps_are_steps(device: Device, tmp_path: Path, shape: str) -> None:
    write_synthetic(tmp_path / "m.gguf", shape, "Q8_0")
    runner = CUDARunner(load_decoder(open_gguf(tmp_path / "m.gguf")), device, max_rows=8)
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
    runner.close()
