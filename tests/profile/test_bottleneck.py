"""The verdict: in virtual time for each cause, and on the CPU with something really made slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llvmlite import binding as llvm
from profile_fakes import SUBJECT

from headrace.cpu.attention import SCORES
from headrace.cpu.compile import emit_object, host_target
from headrace.cpu.layout import FEED_FORWARD_OUT, PROJECT_OUT
from headrace.cpu.runner import CPURunner
from headrace.gguf import open_gguf
from headrace.instrument import Work
from headrace.model import load_decoder
from headrace.profile.bottleneck import AT_THE_ROOF, Cause
from headrace.profile.measure import profile_runner
from headrace.synth import Shape, write_synthetic


@pytest.fixture
def at_the_roof(fake, profiled):
    """A runner whose parts take what they must: matmuls read their weights, the rest is free."""
    return take_the_least(fake(lambda part: 0.0), profiled, tokens=3)


def take_the_least(runner, profiled, **options):
    """Each part takes what it needs at the ceilings."""
    profile = profiled(runner, **options)
    ideal = {record.part: max(record.ideal(profile.ceilings)) for record in profile.records}
    runner.seconds = lambda part: ideal[part]
    return runner


def test_nothing_lost_is_the_machine_itself(at_the_roof, profiled):
    found = profiled(at_the_roof, tokens=3).bottleneck
    assert found.cause is Cause.MEMORY
    assert (found.operation, found.part) == ("FeedForwardIn", "matmul")  # the most bytes
    assert found.lost < 0.01
    assert "Fewer bytes would help" in found.sentence
    assert "No other loss is above 0%" in found.sentence


def test_a_slow_part_that_reads_slowly_is_bound_by_its_instructions(fake, profiled):
    runner = take_the_least(fake(lambda part: 0.0), profiled, tokens=3, depth=200)
    needed = runner.seconds
    runner.seconds = lambda p: needed(p) * (20 if Work.ATTENTION in p.works else 1)
    found = profiled(runner, tokens=3, depth=200).bottleneck
    assert (found.cause, found.operation, found.part) == (Cause.COMPUTE, "Attend", "attention")
    assert found.share > found.lost > AT_THE_ROOF
    assert "faster kernel" in found.sentence


def test_a_part_near_the_bandwidth_waits_for_memory(at_the_roof, profiled):
    needed = at_the_roof.seconds
    matmul = (Work.MATMUL,)
    at_the_roof.seconds = lambda p: needed(p) * (1.7 if p.works == matmul else 1)
    found = profiled(at_the_roof, tokens=3).bottleneck
    assert (found.cause, found.operation) == (Cause.MEMORY, "FeedForwardIn")
    assert "Asking for its bytes earlier" in found.sentence


@pytest.mark.parametrize(
    ("threads", "sentence"),
    [(2, "Barriers are the limit: threads wait"), (None, "Launch gaps are the limit: the device")],
)
def test_waiting(at_the_roof, profiled, threads, sentence):
    """Of threads for each other, or of a device that has none, between its kernels."""
    at_the_roof.n_threads = threads
    needed = at_the_roof.seconds
    down = next(i for i, op in enumerate(at_the_roof.decoder.operations) if hasattr(op, "down"))
    total = sum(needed(p) for p in at_the_roof.instrument().parts)
    slow = next(p for p in at_the_roof.instrument().parts if p.operation == down)
    at_the_roof.seconds = lambda p: needed(p) + (total if p == slow else 0)
    at_the_roof.waiting = lambda p: total if p == slow else 0.0
    found = profiled(at_the_roof, tokens=3).bottleneck
    assert (found.cause, found.operation, found.part) == (Cause.GAPS, "FeedForwardOut", "matmul")
    assert found.share == pytest.approx(0.5, abs=0.02)
    assert found.sentence.startswith(sentence)
    assert "matmul (FeedForwardOut)" in found.sentence


def test_gaps_between_kernels(at_the_roof, profiled):
    at_the_roof.gap = 1e-3
    found = profiled(at_the_roof, tokens=3).bottleneck
    assert found.cause is Cause.GAPS
    assert found.sentence.startswith("Launch gaps are the limit")


@pytest.mark.parametrize("where", ["embedding", "outside"])
def test_the_host(at_the_roof, profiled, where):
    if where == "outside":
        at_the_roof.before = 1.0
    else:
        needed = at_the_roof.seconds
        at_the_roof.seconds = lambda p: 1.0 if p.host else needed(p)
    found = profiled(at_the_roof, tokens=3).bottleneck
    assert (found.cause, found.operation, found.part) == (Cause.HOST, "Embed", "embed")
    assert found.share > 0.9


def test_arithmetic_is_the_limit_of_long_prompts(fake, profiled):
    """Many rows share what they read: at the roof, the time is that of the multiplications."""
    options = {"prompt": 4, "depth": 300, "repetitions": 1}
    runner = take_the_least(fake(lambda part: 0.0), profiled, **options)
    found = profiled(runner, **options).bottleneck
    assert (found.cause, found.operation) == (Cause.COMPUTE, "Attend")
    assert found.sentence.startswith("Arithmetic is the limit")
    assert "prompt" in found.sentence


# On the CPU, with a kernel that does its work many times


@pytest.fixture(params=[1])
def runner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[CPURunner]:
    """A small random model whose phases are not all overhead. One thread waits for nobody."""
    path = tmp_path / "small.gguf"
    shape = Shape("llama", 2, 512, 1024, 8, 4, 64, 1024, 512, 1e4)
    write_synthetic(path, shape, "Q8_0")
    runner = CPURunner(load_decoder(open_gguf(path)), request.param)
    yield runner
    runner.close()


def repeated(address: int, n_arguments: int, times: int, above: int = 0) -> Any:
    """A kernel ``slow`` that calls the one at ``address`` so many times; keep what is returned.

    ``above``: once only, when the last argument is below it.
    """
    names = ", ".join(f"i64 %a{i}" for i in range(n_arguments))
    assembly = f"""
define void @slow({names}) {{
entry:
  %kernel = inttoptr i64 {address} to ptr
  %chosen = icmp sge i64 %a{n_arguments - 1}, {above}
  %times = select i1 %chosen, i64 {times}, i64 1
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  call void %kernel({names})
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %times
  br i1 %more, label %loop, label %end
end:
  ret void
}}
"""
    code = emit_object(assembly, host_target(), ["slow"])
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host_target().machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def slow_matmuls(runner: CPURunner, kind: int, times: int, above: int = 0) -> list[Any]:
    """Do every matmul of one kind of operation so many times: the result stays the same."""
    plan, kept = runner._plan, []
    for op in plan.operations[plan.operations["kind"] == kind]:
        for matmul in plan.matmuls[op["first_matmul"] : op["last_matmul"]]:
            matmul["accumulate"] = 0
            kept.append(repeated(int(matmul["kernel"]), 4, times, above))
            matmul["kernel"] = kept[-1].get_function_address("slow")
    return kept


def verdict(runner: CPURunner):
    return profile_runner(runner, SUBJECT, tokens=12, depth=64).bottleneck


def test_a_slowed_matmul_is_named(runner):
    """ProjectOut's, the smallest of a layer: nobody would guess it."""
    kept = slow_matmuls(runner, PROJECT_OUT, 300)
    found = verdict(runner)
    assert kept
    assert (found.cause, found.operation) == (Cause.COMPUTE, "ProjectOut")
    assert found.part == "output matmul"
    assert found.lost > 0.5
    assert "output matmul (ProjectOut)" in found.sentence


def test_slowed_attention_is_named(runner):
    slow = repeated(runner._attention.address(SCORES), 6, 2000)
    runner._context["scores_kernel"] = slow.get_function_address("slow")
    found = verdict(runner)
    assert (found.cause, found.operation, found.part) == (Cause.COMPUTE, "Attend", "attention")
    assert found.lost > 0.5


def test_a_slow_host_is_named(runner, monkeypatch):
    begin = runner._begin_pass

    def slow(*arguments):
        time.sleep(0.003)
        begin(*arguments)

    monkeypatch.setattr(runner, "_begin_pass", slow)
    found = verdict(runner)
    assert (found.cause, found.operation) == (Cause.HOST, "Embed")


@pytest.mark.parametrize("runner", [2], indirect=True)
def test_one_late_thread_is_waited_for(runner):
    """Member 1 does its share of a matmul many times, and member 0 waits: half of the two threads'
    time. A member's scratch tells who runs."""
    second = runner._arrays["scratch"][1].ctypes.data
    kept = slow_matmuls(runner, FEED_FORWARD_OUT, 1000, above=second)
    profile = profile_runner(runner, SUBJECT, tokens=8, depth=64)
    assert kept
    slowed = next(g for g in profile.parts if g.first.name == "down matmul")
    assert slowed.waiting.mean / slowed.seconds.mean == pytest.approx(0.5, abs=0.2)
    assert profile.bottleneck.part == "down matmul"
