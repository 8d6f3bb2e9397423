"""Every family on the CPU backend, against the reference, on tiny random models."""

from __future__ import annotations

import numpy as np
import pytest
from batches import n_pages, one_sequence
from tiny_families import CONFIGS, tiny_model, write_tiny

from headrace.devices import load_runner
from headrace.gguf.reader import open_gguf
from headrace.model import load_decoder

TOKENS = np.random.default_rng(7).integers(0, 70, 70).tolist()

# Random layers amplify the noise of int8 activations: these measure 0.01 to 0.06, and the deep
# "-27b" ones, which differ by a scale only, too much to tell anything.
LIMIT = 0.12


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("-27b")])
def test_cpu_matches_the_reference(name, tmp_path):
    decoder = load_decoder(open_gguf(write_tiny(tiny_model(name), tmp_path / "tiny.gguf")))
    runners = [load_runner(decoder, device) for device in ("reference", "cpu")]
    outputs = []
    for runner in runners:
        runner.allocate_cache(n_pages(len(TOKENS)))
        prompt = runner.step(one_sequence(TOKENS[:40]))
        decode = [runner.step(one_sequence([t], 40 + i)) for i, t in enumerate(TOKENS[40:])]
        hidden = runner.hidden(one_sequence(TOKENS))
        outputs.append({"prompt": prompt, "decode": np.concatenate(decode), "hidden": hidden})
        runner.close()
    exact, cpu = outputs
    for what, expected in exact.items():
        error = np.sqrt(np.mean(np.square(cpu[what] - expected))) / expected.std()
        assert error < LIMIT, f"{what}: relative error {error:.3f}"
