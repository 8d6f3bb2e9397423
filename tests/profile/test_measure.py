"""What a profile adds up to, in virtual time: every figure is known beforehand."""

from __future__ import annotations

import json

import pytest
from profile_fakes import SUBJECT
from tiny_families import CONFIGS

from headrace.errors import DeviceError, RequestError
from headrace.instrument import Part, Span, Work
from headrace.profile.measure import WARM_UP, attributed, profile_runner
from headrace.profile.record import Level, level_of

LAYERS = CONFIGS["llama"]["num_hidden_layers"]


def span(start: float, end: float) -> Span:
    return Span(Part(0, "p", (), ""), start, end)


def test_overlapping_time_counts_once_for_the_earlier():
    spans = [span(0, 4), span(3, 6), span(4, 5), span(7, 8)]
    assert attributed(spans) == [(4, 0), (2, 0), (0, 0), (1, 1)]
    assert attributed([]) == []


def test_the_whole_token_is_accounted_for(fake, profiled):
    """Parts, gaps, what the host does outside: they make up the wall time."""
    runner = fake(lambda part: 10e-6)
    runner.before, runner.after, runner.gap, runner.preparing = 7e-6, 5e-6, 1e-6, 1.0
    profile = profiled(runner, tokens=4)
    parts = len(runner.instrument().parts)
    device_gaps = parts - 2  # what lies between the host's embedding and the device is the host's
    assert profile.seconds.mean == pytest.approx(parts * 10e-6 + (parts - 1) * 1e-6 + 12e-6)
    assert profile.total.seconds.mean == pytest.approx(parts * 10e-6)
    assert profile.gap_share * profile.seconds.mean == pytest.approx(device_gaps * 1e-6)
    assert profile.outside_share * profile.seconds.mean == pytest.approx(13e-6)
    assert profile.unattributed_share == pytest.approx(profile.gap_share + profile.outside_share)
    shares = [group.seconds.mean / profile.seconds.mean for group in profile.parts]
    assert sum(shares) + profile.unattributed_share == pytest.approx(1)
    for groups in (profile.levels, profile.operations, profile.layers):
        assert sum(g.seconds.mean for g in groups) == pytest.approx(profile.total.seconds.mean)
        assert sum(len(g.records) for g in groups) == parts


def test_overhead_is_what_the_time_stamps_add(fake, profiled):
    runner = fake(lambda part: 10e-6)
    parts = len(runner.instrument().parts)
    runner.slower = 0.02 * parts * 10e-6
    profile = profiled(runner, tokens=5)
    assert profile.overhead_share == pytest.approx(0.02)
    assert profile.plain.median == pytest.approx(parts * 10e-6)
    assert profile.tokens_per_second == pytest.approx(1 / (parts * 10e-6))


def test_both_are_run_in_turn_at_the_same_positions(fake, profiled):
    runner = fake()
    profile = profiled(runner, tokens=4, depth=6)
    filled, ran = runner.batches[:2], runner.batches[2:]
    assert [b.positions.tolist() for _, b in filled] == [[0, 1, 2, 3], [4, 5]]
    assert not any(timed or len(batch.logit_rows) for timed, batch in filled)
    measured = ran[4 * WARM_UP["decode"] :]
    assert not any(timed for timed, _ in measured[::2])  # before each one that nobody counts
    assert [timed for timed, _ in measured[1::2]] == [False, True, True, False] * 2
    positions = [b.positions.tolist() for _, b in measured]
    assert positions == [[p] for p in (6, 7, 8, 9) for _ in "0123"]
    assert [len(sample.spans) for sample in profile.samples] == [len(runner.instrument().parts)] * 4
    assert runner.pages == 1
    # The likeliest token of a position is read at the next.
    assert measured[-1][1].tokens.tolist() == [8 % 7]


def test_a_prompt_goes_through_in_steps(fake, profiled):
    runner = fake(lambda part: 1e-5)
    profile = profiled(runner, prompt=10, depth=3, repetitions=2)
    measured = runner.batches[1 + 8 * WARM_UP["prefill"] :]
    steps = [(b.positions.tolist(), b.logit_rows.tolist()) for timed, b in measured if timed]
    prompt = [([3, 4, 5, 6], []), ([7, 8, 9, 10], []), ([11, 12], [1])]
    assert steps == prompt * 2
    assert (profile.mode, profile.unit, profile.n_tokens, profile.plain.count) == (
        "prefill", "prompt", 10, 2,
    )  # fmt: skip
    assert profile.tokens_per_second == pytest.approx(10 / profile.plain.median)
    # A matmul of a layer ran three times a prompt, and read its weights each time.
    record = next(r for r in profile.records if Work.MATMUL in r.part.works)
    assert record.seconds.median == pytest.approx(3e-5)
    op = runner.decoder.operations[record.part.operation]
    weights = sum(runner.decoder.weights[x.weight].n_bytes for x in (op.q, op.k, op.v))
    assert record.cost.weight_bytes == 3 * weights
    assert record.cost.flops == 2 * 10 * (op.q.n + op.k.n + op.v.n) * op.q.k


def test_records_hold_each_sample(fake, profiled):
    """Count, minimum, median and maximum over the tokens; groups add up token by token."""
    runner = fake()
    taken = iter(range(10_000_000))
    runner.seconds = lambda part: 1e-6 * (next(taken) % 997 + 1)
    profile = profiled(runner, tokens=7)
    for record in profile.records:
        s = record.seconds
        assert (s.count, s.min <= s.median <= s.max) == (7, True)
    group = profile.parts[2]
    assert len(group.records) == LAYERS
    by_token = zip(*(r.seconds.samples for r in group.records), strict=True)
    assert group.seconds.samples == pytest.approx([sum(token) for token in by_token])


def test_levels_and_layers(fake, profiled):
    profile = profiled(fake(), tokens=1)
    assert [group.first.level for group in profile.levels] == list(Level)
    names = [group.name for group in profile.layers]
    assert names == ["Embed", *(f"layer {i}" for i in range(LAYERS)), "Head"]
    assert level_of((Work.NORM, Work.MATMUL, Work.ROTARY)) is Level.MACRO
    assert level_of((Work.MATMUL, Work.RESIDUAL)) is Level.MACRO
    assert level_of((Work.NORM, Work.QUANTISE)) is Level.MICRO
    assert level_of((Work.ATTENTION, Work.QUANTISE)) is Level.MIDI
    assert level_of((Work.POST_NORM, Work.RESIDUAL)) is Level.MICRO


def test_the_roofline_is_the_lower_of_both_ceilings(fake, profiled):
    """The fake reads 1e9 bytes and computes 8e9 or 2e9 FLOPs a second."""
    profile = profiled(fake(lambda part: 1e-3), tokens=3)
    matmul = next(g for g in profile.parts if g.first.part.arithmetic == "integers")
    assert matmul.cost.intensity < 8  # bound by memory
    assert matmul.is_bound_by_memory(profile.ceilings)
    least = matmul.cost.n_bytes / 1e9
    assert matmul.roofline_share(profile.ceilings) == pytest.approx(least / (1e-3 * LAYERS))
    lower = min(1e9 * matmul.cost.intensity, 8e9)
    assert matmul.flops_per_second / lower == pytest.approx(matmul.roofline_share(profile.ceilings))
    prefill = profiled(fake(lambda part: 1e-3), prompt=4, depth=400, repetitions=1)
    attention = next(g for g in prefill.parts if g.first.operation == "Attend")
    assert attention.cost.intensity > 2  # four rows share what they read: bound by arithmetic
    assert not attention.is_bound_by_memory(prefill.ceilings)
    assert attention.ideal(prefill.ceilings) == pytest.approx(attention.cost.flops / 2e9)


def test_refusals(fake, profiled):
    class Plain:
        device_name = "a device without a clock"

    with pytest.raises(
        DeviceError, match=r"without a clock cannot be profiled.*cpu, cuda, reference"
    ):
        profile_runner(Plain(), SUBJECT)
    runner = fake()
    with pytest.raises(RequestError, match=r"600 positions.*512"):
        profiled(runner, tokens=100, depth=500)
    assert runner.batches == []


def test_json_is_json(fake, profiled):
    facts = json.loads(json.dumps(profiled(fake(), tokens=2).as_json()))
    assert facts["seconds"]["count"] == 2
    assert facts["total"]["share"] == pytest.approx(1 - facts["unattributed_share"])
    assert len(facts["records"]) == sum(part["records"] for part in facts["parts"])
    assert {record["layer"] for record in facts["records"]} == {None, *range(LAYERS)}
    assert facts["bottleneck"]["sentence"]
