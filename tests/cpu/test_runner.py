"""The CPU runner's contract: the same bits whatever the shape of a step, and its limits."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import tiny_families
from batches import n_pages, one_sequence, rows
from tiny_families import CONFIGS, tiny_model, write_tiny

from headrace.cpu import isa
from headrace.cpu.runner import MAX_LOGIT_ROWS, MAX_ROWS, CPURunner
from headrace.gguf.reader import open_gguf
from headrace.gguf.recipes import RECIPES
from headrace.gguf.types import QuantType
from headrace.model import load_decoder
from headrace.reference.runner import ReferenceRunner
from headrace.synth import write_synthetic

TOKENS = np.random.default_rng(3).integers(0, 70, 300).tolist()
PAGES = n_pages(len(TOKENS))


def tiny_decoder(path, name):
    return load_decoder(open_gguf(write_tiny(tiny_model(name), path / f"{name}.gguf")))


def synthetic_decoder(path, shape, recipe):
    file = path / f"{shape}-{recipe}.gguf"
    write_synthetic(file, shape, recipe)
    return load_decoder(open_gguf(file))


@pytest.fixture(scope="module", params=["llama-biases", "gemma3", "phi3-partial", "Q4_K_M"])
def decoder(request, tmp_path_factory):
    """Biases; post-norms, QK norms and windows; a partial rotary; K-quants."""
    path = tmp_path_factory.mktemp("models")
    if request.param in CONFIGS:
        return tiny_decoder(path, request.param)
    return synthetic_decoder(path, "gemma3-tiny", request.param)


@pytest.fixture
def make_runner(decoder):
    runners = []

    def make(pages=PAGES, threads=2, instruction_set=None):
        runners.append(CPURunner(decoder, threads, instruction_set))
        runners[-1].allocate_cache(pages)
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.fixture(scope="module")
def whole(decoder):
    """Logits of all TOKENS, 300 rows in one step."""
    runner = CPURunner(decoder, 2)
    runner.allocate_cache(PAGES)
    logits = runner.step(one_sequence(TOKENS))
    assert len(TOKENS) > MAX_ROWS > MAX_LOGIT_ROWS
    runner.close()
    return logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_match_the_reference(recipe, tmp_path):
    decoder = synthetic_decoder(tmp_path, "llama-tiny", recipe)
    tokens = np.random.default_rng(1).integers(0, decoder.config.n_vocab, 70).tolist()
    results = []
    for runner in (ReferenceRunner(decoder), CPURunner(decoder, 2)):
        runner.allocate_cache(2)
        prompt = runner.step(one_sequence(tokens[:66]))
        decode = [runner.step(one_sequence([t], 66 + i)) for i, t in enumerate(tokens[66:])]
        results.append(np.concatenate([prompt, *decode]))
        runner.close()
    exact, cpu = results
    error = np.sqrt(np.mean(np.square(cpu - exact))) / exact.std()
    assert error < (2e-3 if recipe in ("F32", "F16", "BF16") else 0.06)


# The same bits


@pytest.mark.parametrize("chunks", [[1] * 130, [7] * 43, [64, 1, 63, 100, 72], [299, 1]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_equal_the_whole(make_runner, whole, chunks, threads):
    runner = make_runner(threads=threads)
    edges = np.cumsum([0, *chunks]).clip(max=len(TOKENS))
    for start, stop in pairwise(edges.tolist()):
        logits = runner.step(one_sequence(TOKENS[start:stop], start))
        assert (logits == whole[start:stop]).all()


@pytest.mark.parametrize("name", [s.name for s in isa.supported()])
def test_instruction_sets_equal_each_other(make_runner, whole, name):
    runner = make_runner(instruction_set=name)
    assert name in runner.device_name
    assert (runner.step(one_sequence(TOKENS[:80])) == whole[:80]).all()
    assert (runner.step(one_sequence(TOKENS[80:81], 80)) == whole[80]).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_slots_beside_each_other(make_runner, whole, threads):
    """Prompts, decodes and chunks of several slots in one step, on shuffled pages."""
    pages = [[6, 1, 9, 0, 4], [5, 3, 10], [2, 8]]
    alone = make_runner(3)
    other = TOKENS[::-1][:140]
    whole_other = alone.step(one_sequence(other))
    runner = make_runner(11, threads=threads)
    runner.step(rows([(1, i, other[i]) for i in range(62)], pages, logit_rows=[]))
    runner.step(rows([(0, i, TOKENS[i]) for i in range(100)], pages, logit_rows=[]))
    # Slot 0 in chunks of three, slot 1 token by token, slot 2 from its start in chunks of five.
    for n in range(20):
        mixed = [(0, 100 + 3 * n + i, TOKENS[100 + 3 * n + i]) for i in range(3)]
        mixed += [(1, 62 + n, other[62 + n])]
        mixed += [(2, 5 * n + i, TOKENS[5 * n + i]) for i in range(5)]
        logits = runner.step(rows(mixed, pages))
        assert (logits[:3] == whole[100 + 3 * n : 103 + 3 * n]).all()
        assert (logits[3] == whole_other[62 + n]).all()
        assert (logits[4:] == whole[5 * n : 5 * n + 5]).all()


def test_alternating_rows_of_two_slots(make_runner, whole):
    runner = make_runner(2 * PAGES)
    pages = [list(range(PAGES)), list(range(PAGES, 2 * PAGES))]
    mixed = [(slot, i, TOKENS[i]) for i in range(150) for slot in (0, 1)]
    logits = runner.step(rows(mixed, pages))
    assert (logits[::2] == whole[:150]).all()
    assert (logits[1::2] == whole[:150]).all()


def test_only_the_rows_asked_for(make_runner, whole):
    runner = make_runner()
    for wanted in ([], [0], [299], [2, 255, 256, 299], list(range(250, 300)), list(range(33))):
        logits = runner.step(one_sequence(TOKENS, logit_rows=wanted))
        assert logits.shape == (len(wanted), runner.decoder.config.n_vocab)
        assert (logits == whole[wanted]).all()


def test_results_are_fresh_arrays(make_runner, whole):
    runner = make_runner()
    first = runner.step(one_sequence(TOKENS[:3]))
    runner.step(one_sequence(TOKENS[3:6], 3))
    assert (first == whole[:3]).all()


def test_hidden(make_runner, decoder):
    runner = make_runner()
    hidden = runner.hidden(one_sequence(TOKENS))
    assert hidden.dtype == np.float32
    assert hidden.shape == (300, decoder.config.d_model)
    assert (runner.hidden(one_sequence(TOKENS[:9], logit_rows=[1, 8])) == hidden[[1, 8]]).all()
    assert (runner.hidden(one_sequence(TOKENS[9:10], 9)) == hidden[9]).all()
    reference = ReferenceRunner(decoder)
    reference.allocate_cache(PAGES)
    exact = reference.hidden(one_sequence(TOKENS))
    error = np.sqrt(np.mean(np.square(hidden - exact))) / exact.std()
    assert error < 0.12


# Pages


def test_copied_page_continues_alike(make_runner, whole):
    runner = make_runner(8)
    runner.step(one_sequence(TOKENS[:100], pages=[2, 4]))
    runner.copy_page(4, 7)
    runner.step(one_sequence([1], 64, pages=[2, 4]))  # spoils the original only
    logits = runner.step(one_sequence(TOKENS[100:], 100, pages=[2, 7, 0, 1, 3]))
    assert (logits == whole[100:]).all()


def test_page_table_grows_and_shrinks(make_runner, whole):
    runner = make_runner(200)
    runner.step(one_sequence(TOKENS[:60], pages=[150]))
    wide = [150, *range(120)]
    assert (runner.step(one_sequence(TOKENS[60:90], 60, pages=wide)) == whole[60:90]).all()
    narrow = [150, 0]
    assert (runner.step(one_sequence(TOKENS[90:100], 90, pages=narrow)) == whole[90:100]).all()


def test_allocating_again(make_runner, whole):
    runner = make_runner(1)
    for pages in (PAGES, 2 * PAGES, 1):
        runner.allocate_cache(pages)
        assert (runner.step(one_sequence(TOKENS[:50])) == whole[:50]).all()


# Odd shapes and values


@pytest.mark.parametrize("qtype", [QuantType.F16, QuantType.F32])
def test_float_rows_that_are_no_multiple_of_a_group(monkeypatch, tmp_path, qtype):
    """72 values are four groups of 16 and a half, and 8 more are padding of nothing."""
    changes = {"hidden_size": 72, "intermediate_size": 120, "head_dim": 12}
    monkeypatch.setitem(CONFIGS, "odd", {**CONFIGS["llama"], **changes})
    monkeypatch.setattr(tiny_families, "_MATRIX_TYPES", [qtype])
    check_against_reference(tiny_decoder(tmp_path, "odd"), 5e-3)


def test_matrices_smaller_than_a_tile(monkeypatch, tmp_path):
    changes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 5}
    monkeypatch.setitem(CONFIGS, "narrow", {**CONFIGS["llama"], **changes})
    monkeypatch.setattr(tiny_families, "_MATRIX_TYPES", [QuantType.F32])
    model = tiny_model("narrow")
    for name in ("lm_head.weight", "model.layers.1.self_attn.v_proj.weight"):  # 5 and 4 rows
        model.add(name, model.weights[name], QuantType.Q8_0)
    decoder = load_decoder(open_gguf(write_tiny(model, tmp_path / "narrow.gguf")))
    check_against_reference(decoder, 0.03)


def check_against_reference(decoder, limit):
    tokens = [t % decoder.config.n_vocab for t in TOKENS[:70]]
    results = []
    for runner in (ReferenceRunner(decoder), CPURunner(decoder, 3)):
        runner.allocate_cache(2)
        prompt = runner.step(one_sequence(tokens[:69]))
        results.append(np.concatenate([prompt, runner.step(one_sequence(tokens[69:], 69))]))
        runner.close()
    exact, cpu = results
    assert np.sqrt(np.mean(np.square(cpu - exact))) / exact.std() < limit


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight"])
def test_nan_weights_show_in_the_logits(decoder, name):
    tensor = decoder.weights[name]
    data = tensor.data.copy()
    data.view(np.float32)[0, 3] = np.nan
    weights = {**decoder.weights, name: dataclasses.replace(tensor, data=data)}
    runner = CPURunner(dataclasses.replace(decoder, weights=weights), 2)
    runner.allocate_cache(1)
    assert np.isnan(runner.step(one_sequence(TOKENS[:2]))).any(axis=1).all()
    runner.close()
