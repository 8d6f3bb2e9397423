"""The CPU backend is no further from exact arithmetic than llama.cpp is, on the real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.devices import load_runner
from headrace.gguf.reader import open_gguf
from headrace.model import load_decoder
from headrace.reference.accuracy import measure, read_golden

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("path", "golden_name"),
    [
        ("smollm2_path", "smollm2-135m-instruct-q4_1.json"),
        ("gemma3_path", "gemma-3-270m-q4_k_m.json"),
    ],
    ids=["smollm2", "gemma3"],
)
def test_cpu_is_no_further_from_exact_than_llama_cpp(path, golden_name, request):
    golden = read_golden(GOLDEN / golden_name)
    decoder = load_decoder(open_gguf(request.getfixturevalue(path)))
    reference, cpu = load_runner(decoder, "reference"), load_runner(decoder, "cpu")
    try:
        accuracy = measure(reference, cpu, golden)
    finally:
        reference.close()
        cpu.close()
    assert accuracy.failures(golden.llama_cpp) == []
