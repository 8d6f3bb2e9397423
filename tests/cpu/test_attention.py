"""Attention: its two kernels alone, and through the runner against the reference."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import tiny_families
from batches import rows
from tiny_families import CONFIGS, tiny_model, write_tiny

from headrace.backend import PAGE_SIZE
from headrace.cpu import isa
from headrace.cpu.attention import SCORES, VALUES
from headrace.cpu.compile import attention_library
from headrace.cpu.runner import CPURunner
from headrace.gguf.reader import open_gguf
from headrace.gguf.types import QuantType
from headrace.model import load_decoder
from headrace.reference.runner import ReferenceRunner

GUARD = np.float32(12345.0)


@pytest.fixture(params=isa.supported(), ids=lambda s: s.name)
def kernels(request):
    library = attention_library(request.param)
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)
    return {name: kind(library.address(name)) for name in (SCORES, VALUES)}


def halves(rng, *shape):
    return rng.standard_normal(shape).astype(np.float16)


def check(result, terms_a, terms_b, start=0.0):
    exact = start + terms_a @ terms_b
    magnitude = np.abs(start) + np.abs(terms_a) @ np.abs(terms_b)
    assert (np.abs(result - exact) <= 1e-6 * magnitude).all()


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_scores_of_a_page(kernels, head_dim):
    rng = np.random.default_rng(head_dim)
    keys = halves(rng, head_dim, PAGE_SIZE)
    for n in (1, 2, 4, 5, 9):
        q = rng.standard_normal((n, head_dim)).astype(np.float32)
        scores = np.full((n + 1, PAGE_SIZE), np.nan, np.float32)
        scores[n] = GUARD
        kernels[SCORES](q.ctypes.data, keys.ctypes.data, scores.ctypes.data, n, PAGE_SIZE, head_dim)
        check(scores[:n], q.astype(float), keys.astype(float))
        assert (scores[n] == GUARD).all()


@pytest.mark.parametrize("stride", [16, 64, 80, 96, 128, 256])
def test_values_of_a_page(kernels, stride):
    rng = np.random.default_rng(stride)
    values = halves(rng, PAGE_SIZE, stride)
    for n, used in ((1, 1), (2, 63), (4, 64), (5, 17), (9, 64)):
        weights = rng.random((n, PAGE_SIZE)).astype(np.float32)
        before = rng.standard_normal((n, stride)).astype(np.float32)
        out = np.full((n + 1, stride), GUARD)
        out[:n] = before
        unused = values.copy()
        unused[used:] = np.nan  # positions not yet written hold anything
        kernels[VALUES](weights.ctypes.data, unused.ctypes.data, out.ctypes.data, n, stride, used)
        check(out[:n], weights[:, :used].astype(float), values[:used].astype(float), before)
        assert (out[n] == GUARD).all()


def test_subnormal_and_extreme_halves(kernels):
    """Every finite half is read exactly (the portable set has no instruction for it)."""
    finite = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    for page in np.resize(finite, (-(-len(finite) // PAGE_SIZE), 1, PAGE_SIZE)):
        q, scores = np.ones(1, np.float32), np.zeros(PAGE_SIZE, np.float32)
        keys = page.copy()
        kernels[SCORES](q.ctypes.data, keys.ctypes.data, scores.ctypes.data, 1, PAGE_SIZE, 1)
        assert (scores == page[0].astype(np.float32)).all()


# Through the runner, with float weights: nothing but attention differs.

LENGTHS = (63, 64, 65, 300)

WORST, MEDIAN = 4e-3, 1e-4
"""Limits of the error of a row: now and then a key near a tie rounds to the other half."""


class HalfCacheReference(ReferenceRunner):
    """The reference, with keys and values rounded to half precision as the CPU's cache is."""

    def _project_qkv(self, op, x, batch):
        q = super()._project_qkv(op, x, batch)
        layer = self._allocated()[op.layer]
        layer[:] = layer.astype(np.float16)
        return q


@pytest.fixture
def decoder_of(monkeypatch, tmp_path):
    def make(family: str, **changes):
        config = {**CONFIGS[family], "num_hidden_layers": 1, **changes}
        monkeypatch.setitem(CONFIGS, "attention", config)
        monkeypatch.setattr(tiny_families, "_MATRIX_TYPES", [QuantType.F32])
        path = write_tiny(tiny_model("attention"), tmp_path / "tiny.gguf")
        return load_decoder(open_gguf(path))

    return make


def compare(decoder, threads: int = 2) -> None:
    """Sequences of LENGTHS on shuffled pages: prompts together, then a few steps of all."""
    rng = np.random.default_rng(5)
    n_vocab = decoder.config.n_vocab
    sequences = [rng.integers(0, n_vocab, length + 4) for length in LENGTHS]
    n_each = [-(-len(s) // PAGE_SIZE) for s in sequences]
    order = rng.permutation(sum(n_each) + 3)
    pages = [p.tolist() for p in np.split(order, np.cumsum(n_each))[:-1]]
    outputs = []
    for runner in (HalfCacheReference(decoder), CPURunner(decoder, threads)):
        runner.allocate_cache(len(order))
        junk = rng.integers(0, n_vocab, len(order) * PAGE_SIZE)
        everywhere = [(0, i, t) for i, t in enumerate(junk.tolist())]
        runner.step(rows(everywhere, [order.tolist()], logit_rows=[]))
        prompts = [
            (slot, i, int(s[i])) for slot, s in enumerate(sequences) for i in range(len(s) - 4)
        ]
        hidden = [runner.hidden(rows(prompts, pages))]
        for i in range(4):
            step = [(slot, len(s) - 4 + i, int(s[i - 4])) for slot, s in enumerate(sequences)]
            hidden.append(runner.hidden(rows(step, pages)))
        outputs.append(np.concatenate(hidden))
        runner.close()
    exact, cpu = outputs
    error = np.sqrt(np.mean(np.square(cpu - exact), axis=1)) / exact.std()
    assert error.max() < WORST, f"row {error.argmax()}: {error.max():.1e}"
    assert np.median(error) < MEDIAN


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_query_heads(decoder_of, group):
    compare(decoder_of("llama", num_attention_heads=2 * group, num_key_value_heads=2, head_dim=16))


@pytest.mark.parametrize("head_dim", [4, 24, 64, 80, 96, 128, 256])
def test_head_sizes(decoder_of, head_dim):
    compare(decoder_of("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim))


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 128, 299])
def test_windows(decoder_of, window):
    compare(decoder_of("mistral", sliding_window=window))


@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0])
def test_softcap_beside_a_window(decoder_of, cap):
    compare(
        decoder_of("gemma2", num_hidden_layers=2, attn_logit_softcapping=cap, sliding_window=70)
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_fewer_and_more_threads(decoder_of, threads):
    compare(decoder_of("gemma2", num_hidden_layers=2, sliding_window=70), threads=threads)
