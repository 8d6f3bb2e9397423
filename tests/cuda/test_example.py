"""``examples/executor.py`` runs, here on the host build."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from headrace.cuda.device import Device
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.synth import write_synthetic

EXAMPLE = Path(__file__).parents[2] / "examples" / "executor.py"


@pytest.mark.parametrize(
    ("function", "shows"),
    [
        ("show_operations", "0 synchronisations in all layers"),
        ("show_operations", "ModelError: the model has no matrix 'blk.0.ffn_sideways.weight'"),
        ("show_decoding", "0 synchronisations after the first"),
    ],
)
def test_the_example(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str], function: str, shows: str
) -> None:
    write_synthetic(tmp_path / "m.gguf", "llama-tiny", "Q4_K_M")
    decoder = load_decoder(open_gguf(tmp_path / "m.gguf"))
    runpy.run_path(str(EXAMPLE))[function](decoder, device)
    assert shows in capsys.readouterr().out
