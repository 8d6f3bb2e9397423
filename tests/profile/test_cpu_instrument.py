"""Time stamps inside the CPU's compiled call: complete, in order, and without effect on results."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from batches import one_sequence
from llvmlite import binding as llvm
from llvmlite import ir

from headrace.cpu import ceilings, clock, isa
from headrace.cpu.instrument import parts, phase_ends, read_clock, seconds_per_count
from headrace.cpu.ir import i64
from headrace.cpu.runner import MAX_ROWS, CPURunner
from headrace.errors import DeviceError
from headrace.gguf import open_gguf
from headrace.instrument import InstrumentedRunner, Work
from headrace.model import load_decoder
from headrace.profile.measure import profile_runner
from headrace.profile.record import Subject
from headrace.reference.runner import ReferenceRunner

TOKENS = np.random.default_rng(5).integers(0, 70, 40).tolist()


@pytest.fixture(params=["llama", "gemma2", "gemma3"])
def decoder(tiny_decoder, request):
    """Of every kind of phase: with and without post-norms, head norms, a softcap."""
    return tiny_decoder(request.param)


@pytest.fixture(params=[1, 3])
def runner(decoder, request):
    runner = CPURunner(decoder, request.param)
    runner.allocate_cache(2)
    yield runner
    runner.close()


def test_spans_cover_the_step_in_order(runner):
    """One of each part, one after the other; only the host's part may leave gaps beside it."""
    instrument = runner.instrument()
    for batch in (one_sequence(TOKENS[:30], logit_rows=[29]), one_sequence([3], 30)):
        start = time.perf_counter()
        token = instrument.timed_step(batch)
        taken = time.perf_counter() - start
        spans = instrument.spans()
        assert token is not None
        device = [span for span in spans if not span.part.host]
        assert [span.part for span in device] == parts(runner.decoder)
        assert all(a.end == b.start for a, b in pairwise(spans[: 1 + len(device)]))
        assert all(a.end <= b.start for a, b in pairwise(spans))
        assert all(0 <= span.waiting <= span.end - span.start + 1e-9 for span in device)
        assert 0 < sum(span.end - span.start for span in spans) <= taken * 1.001
        assert spans[0].part.works == (Work.EMBED,)
        assert spans[-1].part.works == (Work.SAMPLE,)
        softcap = runner.decoder.operations[-1].softcap
        assert any(Work.LOGITS in span.part.works for span in spans) == (softcap is not None)


def test_there_are_as_many_phases_as_parts(runner):
    """One more, and the step would write behind its stamps."""
    instrument = runner.instrument()
    instrument._n_stamps += 1
    instrument._stamps = np.zeros((len(instrument._stamps), instrument._n_stamps, 2), np.int64)
    instrument.timed_step(one_sequence(TOKENS[:9], logit_rows=[8]))
    noted = (instrument._stamps[0] != 0).all(axis=1)
    assert noted.tolist() == [True] * (1 + len(parts(runner.decoder))) + [False]


def test_a_chunk_without_logits_ends_before_the_head(runner):
    instrument = runner.instrument()
    instrument.timed_step(one_sequence(TOKENS[:9], logit_rows=[8]))
    assert instrument.timed_step(one_sequence(TOKENS[9:20], 9, logit_rows=[])) is None
    spans = instrument.spans()
    last = len(runner.decoder.operations) - 1
    layered = [part for part in parts(runner.decoder) if part.operation != last]
    assert [span.part for span in spans[1:]] == layered
    assert all(span.end > span.start for span in spans)


def test_the_same_bits_with_and_without_time_stamps(decoder):
    logits = []
    for timed in (False, True):
        runner = CPURunner(decoder, 2)
        runner.allocate_cache(2)
        instrument = runner.instrument()
        step = instrument.timed_step if timed else instrument.plain_step
        chosen = [step(one_sequence(TOKENS[:30], logit_rows=[29])), step(one_sequence([7], 30))]
        logits.append((chosen, runner.step(one_sequence([9], 31))))
        runner.close()
    assert logits[0][0] == logits[1][0]
    assert (logits[0][1] == logits[1][1]).all()


def test_steps_beside_a_timed_one_are_not_timed(runner):
    """Off, nothing is written; also when a timed step was refused."""
    instrument = runner.instrument()
    instrument.timed_step(one_sequence(TOKENS[:5]))
    before = instrument.spans()
    runner.step(one_sequence([1], 5))
    instrument.plain_step(one_sequence([1], 6))
    with pytest.raises(DeviceError, match="token"):
        instrument.timed_step(one_sequence([10_000], 7))
    stamps = instrument._stamps.copy()
    runner.step(one_sequence([1], 7))
    assert (instrument._stamps == stamps).all()
    assert instrument.spans() == before
    assert runner.instrument() is instrument


def test_a_step_that_takes_several_passes_is_refused(runner):
    with pytest.raises(DeviceError, match=f"{MAX_ROWS + 1} rows, at most {MAX_ROWS}"):
        runner.instrument().timed_step(one_sequence([1] * (MAX_ROWS + 1)))


# Three members, two phases: member 0 begins at 100.
STAMPS = np.array(
    [
        [[100, 100], [150, 210], [300, 330]],  # waits 50 for the others, goes on 10 late
        [[90, 90], [200, 201], [280, 330]],  # the last to end the first phase
        [[140, 140], [190, 205], [320, 7]],  # began 40 late; its last note is still to come
    ]
)


def test_a_phase_ends_as_its_last_member_does():
    ends, waiting = phase_ends(STAMPS)
    assert ends == [100, 200, 320]
    assert waiting == pytest.approx([(50 + 0 + (40 + 10)) / 3, (10 + 20 + (1 + 40) + 5) / 3])
    alone, nothing = phase_ends(STAMPS[:1])
    assert (alone, nothing) == ([100, 150, 300], [0, 60])


def test_clocks_that_disagree_are_brought_together():
    """Nobody goes on before everybody has ended: that bounds the difference."""
    shifted = STAMPS + np.array([0, 1_000_000, -1_000_000])[:, None, None]
    ends, waiting = phase_ends(shifted)
    assert ends[0] == 100
    assert 150 <= ends[1] <= 210
    assert 300 <= ends[2] <= 400
    assert all(0 <= each <= 120 for each in waiting)


def test_the_clock_keeps_the_hosts_time():
    count, scale = read_clock(), seconds_per_count()
    start, wall = count(), time.perf_counter()
    time.sleep(0.05)
    assert (count() - start) * scale == pytest.approx(time.perf_counter() - wall, rel=0.01)


@pytest.mark.parametrize(
    ("architecture", "instruction"),
    [("x86_64", "rdtsc"), ("aarch64", "CNTVCT_EL0"), ("riscv64", "")],
)
def test_every_architecture_has_its_instruction(monkeypatch, architecture, instruction):
    """Compiled for it here; the ones that cannot read a clock say so."""
    monkeypatch.setattr(clock, "architecture", lambda: architecture)
    assert clock.is_known() == bool(instruction)
    if not instruction:
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(i64, []), "f")
        assert clock.emit_read(ir.IRBuilder(function.append_basic_block())).constant == 0
        return
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(f"{architecture}-unknown-linux-gnu").create_target_machine()
    module = llvm.parse_assembly(str(clock.build_module()))
    assert instruction in target.emit_assembly(module)


def test_no_clock_no_profile(tiny_decoder, monkeypatch):
    monkeypatch.setattr(clock, "architecture", lambda: "riscv64")
    with pytest.raises(DeviceError, match="no cycle clock is known for riscv64"):
        CPURunner(tiny_decoder("llama"), 1).instrument()


@pytest.mark.parametrize("instruction_set", isa.supported(), ids=lambda s: s.name)
def test_ceilings_do_the_work_they_count(instruction_set):
    """The sums are what the loop should make of ones, so nothing was optimised away."""
    library = ceilings._library(instruction_set)
    lanes, rounds = instruction_set.lanes, 1000
    for name, dtype, each in (("dots", np.int8, 16), ("fmas", np.float32, 1)):
        data, sums = np.ones(8192, dtype), np.zeros(4096, np.uint8)
        library.function(name, 3)(rounds, data.ctypes.data, sums.ctypes.data)
        kind = ceilings.DOTS if name == "dots" else ceilings.FMAS
        n = ceilings._SUMS[kind]
        found = sums.view(np.int32 if name == "dots" else np.float32).reshape(-1, 16)
        assert (found[:n, :lanes] == rounds * each).all()
        assert (found[n:] == 0).all()
        flops = {"dots": 2 * 16, "fmas": 2}[name] * n * lanes
        assert ceilings._flops_of_round(instruction_set, kind) == flops


def test_ceilings_are_of_this_machine():
    """Between one instruction every few cycles and four a cycle, and no kernel above them."""
    best = isa.supported()[0]
    found = ceilings.flops_per_second(best, 1)
    per_instruction = {ceilings.DOTS: 8 * best.lanes, ceilings.FMAS: 2 * best.lanes}
    for kind, flops in found.items():
        assert 1e8 * per_instruction[kind] < flops < 4 * 6e9 * per_instruction[kind]


@pytest.mark.real_model
def test_parts_sum_to_the_measured_token(smollm2_path):
    """Within 5% of what the host's clock says; and the time stamps cost nothing much, by the
    fastest tokens of all tries. Of ten tries, if need be, and by one thread: on a busy machine a
    time says what else it did, and of several threads one always waits for a core.
    """
    runner = CPURunner(load_decoder(open_gguf(smollm2_path)), 1)
    timed, plain = [], []
    for _ in range(10):
        profile = profile_runner(runner, Subject("smollm2", "llama", "cpu"), tokens=32)
        apart = abs(profile.total.seconds.median / profile.seconds.median - 1)
        timed.append(profile.seconds.min)
        plain.append(profile.plain.min)
        cost = min(timed) / min(plain)
        if apart < 0.05 and cost < 1.25 and abs(profile.unattributed_share) < 0.05:
            break
    runner.close()
    assert abs(profile.unattributed_share) < 0.05
    assert apart < 0.05
    assert profile.gap_share == 0
    assert cost < 1.25


def test_the_reference_times_its_operations(decoder):
    runner = ReferenceRunner(decoder)
    seen = []
    runner.observe = lambda op, output: seen.append(op)
    assert isinstance(runner, InstrumentedRunner)
    profile = profile_runner(runner, Subject("tiny", "llama", "reference"), tokens=2)
    assert {g.name for g in profile.operations} == {type(op).__name__ for op in decoder.operations}
    assert 0 <= profile.unattributed_share < 0.5
    assert profile.clock == "the host's clock"
    seen.clear()
    runner.step(one_sequence([1]))
    assert len(seen) == len(decoder.operations)  # whoever observed before observes again
