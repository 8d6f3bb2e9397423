"""Every family on a tiny random model, against logits worked out independently."""

from __future__ import annotations

import numpy as np
import pytest
from batches import n_pages, one_sequence
from naive_transformer import naive_logits
from tiny_families import CONFIGS, tiny_model, write_tiny

from headrace.gguf.reader import open_gguf
from headrace.model import load_decoder
from headrace.reference.runner import ReferenceRunner

# One token; within and just past every window; past a page. Shorter where the model is deep.
LENGTH = dict.fromkeys(CONFIGS, 70) | {"gemma3-27b": 8, "gemma2-27b": 8}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_the_independent_transformer(name, tmp_path):
    model = tiny_model(name)
    decoder = load_decoder(open_gguf(write_tiny(model, tmp_path / "tiny.gguf")))
    tokens = np.random.default_rng(7).integers(0, CONFIGS[name]["vocab_size"], LENGTH[name])
    expected = naive_logits(model.config, model.weights, tokens.tolist())
    assert expected.std() > 0.3, "the model says nothing: the comparison would prove nothing"

    # What is left in float64 is the float32 rounding of rope_freqs and of Gemma's 1 + w.
    for dtype, tolerance in ((np.float64, 5e-6), (np.float32, 2e-4)):
        runner = ReferenceRunner(decoder, dtype=dtype)
        for length in {1, 2, 6, 7, 8, LENGTH[name]}:
            runner.allocate_cache(n_pages(length))
            logits = runner.step(one_sequence(tokens[:length]))
            assert logits.dtype == dtype
            np.testing.assert_allclose(logits, expected[:length], rtol=0, atol=tolerance)
