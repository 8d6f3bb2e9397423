"""What operations cost, against formulas written down from the families' shapes alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from batches import one_sequence, rows
from tiny_families import CONFIGS

from headrace.cpu.instrument import parts as cpu_parts
from headrace.instrument import Formats, Work, works
from headrace.model.decoder import Decoder
from headrace.model.operations import Attend, Embed, FeedForwardIn, Head, ProjectOut, ProjectQKV
from headrace.profile.cost import Cost, Rows, cost

FORMATS = Formats(quantised=2.0, cached=2.0)
FLOATS = Formats(quantised=None, cached=4.0)


def total(decoder: Decoder, step: Rows, formats: Formats = FORMATS) -> Cost:
    spent = Cost()
    for op in decoder.operations:
        for work in works(op):
            spent += cost(decoder, op, (work,), formats, step)
    return spent


def visible(position: int, window: int | None) -> int:
    return min(position + 1, window or position + 1)


def windows(config: dict) -> list[int | None]:
    """Of each layer: Gemma 3 has five local layers to a global one."""
    if config["model_type"] != "gemma3_text":
        return [config.get("sliding_window")] * config["num_hidden_layers"]
    period = config["sliding_window_pattern"]
    local = config["sliding_window"]
    return [local if i % period < period - 1 else None for i in range(config["num_hidden_layers"])]


def closed_flops(name: str, positions: list[int], n_logits: int) -> int:
    """The whole model's FLOPs of one sequence's rows, from its configuration."""
    c = CONFIGS[name]
    gemma = c["model_type"] == "gemma3_text"
    T, d, ff, hd = len(positions), c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    layer = 2 * T * (d * q + 2 * d * kv + q * d + 3 * d * ff)  # the seven matmuls
    layer += 3 * T * (q + kv)  # rotary: four multiplications and two additions a pair
    layer += T * 2 * d  # residual adds
    layer += T * 4 * 2 * d  # norms
    layer += T * ff * (9 if gemma else 3)
    if gemma:
        layer += T * 4 * (q + kv)  # norms of queries and keys
        layer += T * 4 * 2 * d  # post-norms
    attention = 0
    for window in windows(c):
        scores = c["num_attention_heads"] * sum(visible(p, window) for p in positions)
        attention += scores * (4 * hd + 3) + T * q
    head = n_logits * (4 * d + 2 * d * c["vocab_size"])
    embed = T * d if gemma else 0  # scaled by √d
    return c["num_hidden_layers"] * layer + attention + head + embed


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gemma3-scaled"])
@pytest.mark.parametrize("positions", [[0], [3], [40], list(range(9)), list(range(30, 39))])
def test_flops_equal_the_closed_formula(tiny_decoder, name, positions):
    step = Rows.of(one_sequence([1] * len(positions), positions[0], logit_rows=[0]))
    assert total(tiny_decoder(name), step).flops == closed_flops(name, positions, 1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("rows_", [1, 6])
def test_weight_bytes_are_the_files(tiny_decoder, name, rows_):
    """Each matrix and norm once a step, of the embedding a row each; a tied head reads it all."""
    decoder = tiny_decoder(name)
    head, embed = decoder.operations[-1], decoder.operations[0]
    table = decoder.weights[embed.weight]
    expected = sum(tensor.n_bytes for tensor in decoder.weights.values())
    if head.out.weight != embed.weight:
        expected -= table.n_bytes
    expected += rows_ * table.n_bytes // table.n_rows
    step = Rows.of(one_sequence([1] * rows_, logit_rows=[0]))
    assert total(decoder, step).weight_bytes == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (50, 1), (0, 9), (30, 9)])
def test_kv_bytes_equal_the_closed_formula(tiny_decoder, name, start, n):
    """Written once; read: what any of the rows sees, within the window of the layer."""
    c = CONFIGS[name]
    kv = 2 * c["num_key_value_heads"] * c["head_dim"]
    expected = 0
    for window in windows(c):
        seen = {
            p
            for row in range(start, start + n)
            for p in range(row + 1 - visible(row, window), row + 1)
        }
        expected += 2 * kv * (len(seen) + n)
    step = Rows.of(one_sequence([1] * n, start, logit_rows=[0]))
    assert total(tiny_decoder(name), step).kv_bytes == expected


def test_windows_differ_in_gemma3(tiny_decoder):
    """At position 40 a local layer reads 5 positions, a global one 41."""
    decoder = tiny_decoder("gemma3")
    step = Rows.of(one_sequence([1], 40))
    reads = [
        cost(decoder, op, (Work.ATTENTION,), FORMATS, step).kv_bytes / (2 * 2 * op.head_dim)
        for op in decoder.operations
        if isinstance(op, Attend)
    ]
    assert reads == [5, 5, 5, 5, 5, 41, 5]


def test_sequences_of_a_batch_add_up(tiny_decoder):
    decoder = tiny_decoder("mistral")
    batch = rows([(0, 8, 1), (1, 2, 1), (0, 9, 1), (2, 0, 1)], [None] * 3, [])
    step = Rows.of(batch)
    assert sorted(step.runs) == [(0, 0), (2, 2), (8, 9)]
    assert step.n_rows == 4
    alone = [Rows(((a, b),), 0) for a, b in step.runs]
    assert step.scores(7) == sum(one.scores(7) for one in alone) == 1 + 3 + 7 + 7
    assert step.positions_read(7) == sum(one.positions_read(7) for one in alone) == 1 + 3 + 8
    parts = [cost(decoder, decoder.operations[2], (Work.ATTENTION,), FORMATS, r) for r in alone]
    assert cost(decoder, decoder.operations[2], (Work.ATTENTION,), FORMATS, step) == sum(
        parts, start=Cost()
    )


@pytest.mark.parametrize("window", [None, 1, 5, 9, 40])
def test_visible_pairs_by_counting(window):
    for first, last in ((0, 0), (0, 12), (3, 3), (4, 30), (39, 41)):
        pairs = [
            (row, p)
            for row in range(first, last + 1)
            for p in range(row + 1)
            if p > row - (window or 99)
        ]
        step = Rows(((first, last),), 0)
        assert step.scores(window) == len(pairs)
        assert step.positions_read(window) == len({p for _, p in pairs})


def test_matmul_is_2nkt_and_its_activations(tiny_decoder):
    decoder = tiny_decoder("llama-biases")
    op = next(op for op in decoder.operations if isinstance(op, ProjectQKV))
    spent = cost(decoder, op, (Work.MATMUL,), FORMATS, Rows(((0, 4),), 0))
    n = op.q.n + op.k.n + op.v.n
    assert spent.flops == 2 * n * op.q.k * 5 + n * 5  # a bias is an addition
    assert spent.elements == n * 5
    types = {decoder.weights[linear.weight].qtype for linear in (op.q, op.k, op.v)}
    floats = any(qtype.block_size == 1 for qtype in types)
    assert floats  # this layer mixes both: it reads its input in both formats
    assert any(qtype.block_size > 1 for qtype in types)
    assert spent.activation_bytes == 5 * op.q.k * (2 + 4) + 4 * n * 5
    alone = cost(decoder, op, (Work.MATMUL,), FLOATS, Rows(((0, 4),), 0))
    assert alone.activation_bytes == 5 * op.q.k * 4 + 4 * n * 5


def test_what_stays_inside_a_part_moves_nothing(tiny_decoder):
    """Norm, matmuls, rotary and cache in one kernel: the residual stream in, queries out."""
    decoder = tiny_decoder("llama")
    op, step = decoder.operations[1], Rows(((3, 3),), 0)
    d, q = op.q.k, op.q.n
    fused = cost(decoder, op, works(op), FLOATS, step)
    apart = [cost(decoder, op, (work,), FLOATS, step) for work in works(op)]
    assert fused.activation_bytes == 4 * d + 4 * q
    assert fused.activation_bytes < sum(c.activation_bytes for c in apart)
    for name in ("elements", "flops", "weight_bytes", "kv_bytes"):
        assert getattr(fused, name) == sum(getattr(c, name) for c in apart)
    out = decoder.operations[3]
    both = cost(decoder, out, (Work.MATMUL, Work.RESIDUAL), FLOATS, step)
    assert both.activation_bytes == 4 * (out.out.k + 2 * out.out.n)  # x is read and written


def test_quantising_takes_what_the_part_has_made(tiny_decoder):
    decoder = tiny_decoder("llama")
    step = Rows(((0, 0),), 0)
    out = next(op for op in decoder.operations if isinstance(op, ProjectOut))
    ff = next(op for op in decoder.operations if isinstance(op, FeedForwardIn))
    alone = cost(decoder, out, (Work.QUANTISE,), FORMATS, step)
    assert (alone.activation_bytes, alone.flops) == (6 * out.out.k, out.out.k)
    after = cost(decoder, ff, (Work.ACTIVATION, Work.QUANTISE), FORMATS, step)
    assert after.activation_bytes == (4 + 4 + 2) * ff.gate.n


def test_logits_are_scaled_and_capped(tiny_decoder):
    decoder = tiny_decoder("gemma2")
    head = decoder.operations[-1]
    step = Rows(((0, 5),), 2)
    assert works(head) == (Work.NORM, Work.MATMUL, Work.LOGITS, Work.SAMPLE)
    assert cost(decoder, head, (Work.LOGITS,), FORMATS, step).flops == 2 * 2 * head.out.n
    scaled = dataclasses.replace(head, logit_scale=0.5)
    assert cost(decoder, scaled, (Work.LOGITS,), FORMATS, step).flops == 3 * 2 * head.out.n
    assert cost(decoder, head, works(head), FORMATS, Rows(((0, 5),), 0)) == Cost()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cpus_parts_do_each_work_once(tiny_decoder, name):
    """All that the model asks of the device, in its order, and nothing twice."""
    decoder = tiny_decoder(name)
    found = cpu_parts(decoder)
    host = {Work.EMBED, Work.LOGITS, Work.SAMPLE, Work.QUANTISE}
    for i, op in enumerate(decoder.operations):
        done = [work for part in found if part.operation == i for work in part.works]
        assert [w for w in done if w not in host] == [w for w in works(op) if w not in host]
    assert not isinstance(decoder.operations[found[0].operation], Embed)
    assert isinstance(decoder.operations[found[-1].operation], Head)


def test_intensity_of_a_decoded_token(tiny_decoder):
    """About two FLOPs a weight over its bytes: what makes decoding a question of memory."""
    decoder = tiny_decoder("llama")
    op = next(op for op in decoder.operations if isinstance(op, FeedForwardIn))
    spent = cost(decoder, op, (Work.MATMUL,), FORMATS, Rows(((0, 0),), 1))
    weights = [decoder.weights[linear.weight] for linear in (op.gate, op.up)]
    n_bytes = sum(w.n_bytes for w in weights)
    assert spent.intensity == pytest.approx(
        2 * sum(w.n_rows * w.k for w in weights) / n_bytes, rel=0.15
    )
    assert math.isfinite(Cost().intensity)
    assert np.isclose((spent / 2).n_bytes * 2, spent.n_bytes)
