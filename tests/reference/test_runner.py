"""The runner's contract: chunks, slots, pages, limits. Mathematics: tests/model/test_families."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from batches import n_pages, one_sequence, rows
from tiny_families import tiny_model, write_tiny

from headrace.backend import PAGE_SIZE
from headrace.errors import DeviceError, DeviceMemoryError
from headrace.gguf.reader import open_gguf
from headrace.model import load_decoder
from headrace.model.operations import Attend, Embed, FeedForwardIn, Head, ProjectQKV
from headrace.reference import weights
from headrace.reference.runner import ReferenceRunner

TOKENS = np.random.default_rng(3).integers(0, 70, 150).tolist()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def decoder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load_decoder(open_gguf(write_tiny(tiny_model(request.param), path)))


@pytest.fixture
def runner(decoder):
    runner = ReferenceRunner(decoder)
    runner.allocate_cache(8)
    return runner


@pytest.fixture(scope="module")
def whole(decoder):
    """Logits of all TOKENS in one step."""
    runner = ReferenceRunner(decoder)
    runner.allocate_cache(n_pages(len(TOKENS)))
    return runner.step(one_sequence(TOKENS))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_equal_the_whole(runner, whole, chunk):
    for start in range(0, len(TOKENS), chunk):
        logits = runner.step(one_sequence(TOKENS[start : start + chunk], start))
        close(logits, whole[start : start + chunk])


def test_slots_share_a_step_on_scattered_pages(runner, whole):
    pages = [[6, 1, 3], [5, 0]]
    a, b = TOKENS, TOKENS[::-1][:90]
    other = ReferenceRunner(runner.decoder)
    other.allocate_cache(2)
    whole_b = other.step(one_sequence(b))
    runner.step(rows([(0, i, a[i]) for i in range(100)], pages, logit_rows=[]))
    runner.step(rows([(1, i, b[i]) for i in range(62)], pages, logit_rows=[]))
    # A chunk of one slot and a chunk of the other, each across a page's end, interleaved.
    mixed = [row for i in range(28) for row in ((1, 62 + i, b[62 + i]), (0, 100 + i, a[100 + i]))]
    logits = runner.step(rows(mixed, pages, logit_rows=[0, 1, 54, 55]))
    close(logits, np.stack([whole_b[62], whole[100], whole_b[89], whole[127]]))


def test_only_the_rows_asked_for(runner, whole):
    close(runner.step(one_sequence(TOKENS[:20], logit_rows=[2, 19])), whole[[2, 19]])
    assert runner.step(one_sequence(TOKENS[:20], logit_rows=[])).shape == (0, 70)


def test_hidden_times_the_head_is_the_logits(runner, whole):
    hidden = runner.hidden(one_sequence(TOKENS))
    assert hidden.shape == (len(TOKENS), runner.decoder.config.d_model)
    head = runner.decoder.operations[-1]
    (matrix,) = runner._weights.row_blocks(head.out.weight)
    close(hidden @ matrix.T, whole)


def test_copied_page_continues_alike(runner, whole):
    runner.step(one_sequence(TOKENS[:100], pages=[2, 4]))
    runner.copy_page(4, 7)
    runner.step(one_sequence([1], 64, pages=[2, 4]))  # spoils the original only
    close(runner.step(one_sequence(TOKENS[100:], 100, pages=[2, 7, 0])), whole[100:])


def test_allocating_again_forgets(runner):
    runner.step(one_sequence(TOKENS[:10]))
    runner.allocate_cache(1)
    assert not runner._cache.any()


def test_weights_beyond_the_budget_give_the_same(decoder, whole, monkeypatch):
    monkeypatch.setattr(weights, "ROW_BLOCK_BYTES", 64 * 4 * 9)  # nine rows: none divides evenly
    runner = ReferenceRunner(decoder, weight_budget=0)
    runner.allocate_cache(3)
    close(runner.step(one_sequence(TOKENS)), whole)
    assert not any(array.ndim > 1 for array in runner._weights._kept.values())


def test_observe_shows_every_operation(decoder):
    seen = []
    runner = ReferenceRunner(decoder, np.float64, observe=lambda op, out: seen.append((op, out)))
    runner.allocate_cache(1)
    logits = runner.step(one_sequence(TOKENS[:5], logit_rows=[4]))
    c = decoder.config
    widths = {
        Embed: c.d_model,
        ProjectQKV: (c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        Attend: c.n_heads * c.head_dim,
        FeedForwardIn: c.d_ff,
    }
    assert [op for op, _ in seen] == list(decoder.operations)
    for op, output in seen[:-1]:
        assert output.shape == (5, widths.get(type(op), c.d_model))
        assert output.dtype == np.float64
    assert seen[-1][1] is logits
    cached = next(output for op, output in seen if isinstance(op, ProjectQKV))
    kv = c.n_kv_heads * c.head_dim
    close(runner._cache[0, 0, 0, :5].reshape(5, kv), cached[:, -2 * kv : -kv])
    close(runner._cache[0, 1, 0, :5].reshape(5, kv), cached[:, -kv:])


def test_logit_softcap_and_scale(decoder, whole):
    head = dataclasses.replace(decoder.operations[-1], softcap=2.0, logit_scale=0.5)
    assert isinstance(head, Head)
    capped = dataclasses.replace(decoder, operations=(*decoder.operations[:-1], head))
    runner = ReferenceRunner(capped)
    runner.allocate_cache(3)
    close(runner.step(one_sequence(TOKENS)), 2 * np.tanh(whole * 0.5 / 2))


@pytest.mark.parametrize(
    ("batch", "complaint"),
    [
        (one_sequence([70]), "token ids"),
        (one_sequence([-1]), "token ids"),
        (rows([(1, 0, 0)], [None]), "slots"),
        (rows([(-1, 0, 0)], [None]), "slots"),
        (rows([(0, -1, 0)], [None]), "positions"),
        (rows([(0, PAGE_SIZE, 0)], [[0]]), "page"),
        (one_sequence([0], pages=[8]), "page"),
        (one_sequence([0], pages=[-1]), "page"),
        (dataclasses.replace(one_sequence([0]), tokens=np.zeros(0, np.int32)), "length"),
    ],
)
def test_rows_outside_the_cache_or_vocabulary_are_refused(runner, batch, complaint):
    with pytest.raises(DeviceError, match=complaint):
        runner.step(batch)


def test_positions_beyond_the_page_table_are_refused(runner):
    batch = dataclasses.replace(one_sequence([0]), positions=np.array([PAGE_SIZE], np.int32))
    with pytest.raises(DeviceError, match="positions"):
        runner.step(batch)


def test_copying_outside_the_cache_is_refused(runner):
    for source, target in ((-1, 0), (0, 8)):
        with pytest.raises(DeviceError, match="8 pages"):
            runner.copy_page(source, target)


def test_a_cache_is_needed_first(decoder):
    with pytest.raises(DeviceError, match="allocate_cache"):
        ReferenceRunner(decoder).step(one_sequence([0]))


def test_a_cache_larger_than_memory_names_the_bytes(runner):
    with pytest.raises(DeviceMemoryError, match=r"[\d,]+ bytes wanted, [\d,]+ free"):
        runner.allocate_cache(10**12)
    runner.allocate_cache(1)
    runner.step(one_sequence([0]))


def test_close_twice(runner):
    runner.close()
    runner.close()
    with pytest.raises(DeviceError, match="allocate_cache"):
        runner.step(one_sequence([0]))
