"""What the CPU runner refuses: each in a DeviceError, and the process stays usable."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import tiny_families
from batches import one_sequence, rows
from tiny_families import CONFIGS, tiny_model, write_tiny

from headrace.backend import PAGE_SIZE
from headrace.cpu.runner import CPURunner
from headrace.errors import DeviceError, DeviceMemoryError
from headrace.gguf.reader import open_gguf
from headrace.gguf.types import QuantType
from headrace.model import load_decoder


def tiny_decoder(path, name):
    return load_decoder(open_gguf(write_tiny(tiny_model(name), path / "tiny.gguf")))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def runner(decoder):
    runner = CPURunner(decoder, 2)
    runner.allocate_cache(8)
    yield runner
    runner.close()


@pytest.mark.parametrize(
    ("batch", "complaint"),
    [
        (one_sequence([1 << 30]), "token"),
        (one_sequence([-1]), "token"),
        (rows([(1, 0, 0)], [None]), "slot"),
        (rows([(-1, 0, 0)], [None]), "slot"),
        (rows([(0, -1, 0)], [None]), "position"),
        (rows([(0, PAGE_SIZE, 0)], [[0]]), "page"),
        (one_sequence([0], pages=[8]), "page"),
        (one_sequence([0], pages=[-1]), "page"),
        (dataclasses.replace(one_sequence([0]), positions=np.array([64], np.int32)), "position"),
    ],
)
def test_rows_outside_the_cache_or_vocabulary_are_refused(runner, batch, complaint):
    with pytest.raises(DeviceError, match=complaint):
        runner.step(batch)


def test_a_cache_is_needed_first(decoder):
    runner = CPURunner(decoder, 1)
    for use in (
        lambda: runner.step(one_sequence([0])),
        lambda: runner.hidden(one_sequence([0])),
        lambda: runner.copy_page(0, 0),
    ):
        with pytest.raises(DeviceError, match="allocate_cache"):
            use()


def test_copying_outside_the_cache_is_refused(runner):
    for source, target in ((-1, 0), (0, 8)):
        with pytest.raises(DeviceError, match="8 pages"):
            runner.copy_page(source, target)


def test_close_twice(runner):
    runner.step(one_sequence([1, 2, 3]))
    runner.close()
    runner.close()
    with pytest.raises(DeviceError, match="allocate_cache"):
        runner.step(one_sequence([0]))


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_some(decoder, threads):
    with pytest.raises(DeviceError, match="threads"):
        CPURunner(decoder, threads)


def test_unknown_instruction_set_lists_those_that_run(decoder):
    with pytest.raises(DeviceError, match=r"'sse9'.*portable"):
        CPURunner(decoder, instruction_set="sse9")


@pytest.mark.parametrize(("qtype", "width"), [(QuantType.F16, 68), (QuantType.F32, 66)])
def test_row_lengths_that_no_kernel_takes(monkeypatch, tmp_path, qtype, width):
    monkeypatch.setitem(CONFIGS, "odd", {**CONFIGS["llama"], "hidden_size": width})
    monkeypatch.setattr(tiny_families, "_MATRIX_TYPES", [qtype])
    with pytest.raises(DeviceError, match=rf"attn_q.weight: rows of {width} {qtype.name}"):
        CPURunner(tiny_decoder(tmp_path, "odd"))


def test_a_cache_larger_than_memory_names_the_bytes(runner):
    expected = runner.step(one_sequence([1, 2]))
    for pages in (1 << 45, 10**19):
        with pytest.raises(DeviceMemoryError, match=r"[\d,]{15,} bytes.* free"):
            runner.allocate_cache(pages)
        with pytest.raises(DeviceError, match="allocate_cache"):
            runner.step(one_sequence([0]))
    runner.allocate_cache(1)
    assert (runner.step(one_sequence([1, 2])) == expected).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_is_told(decoder, threads):
    runner = CPURunner(decoder, threads)
    runner.allocate_cache(1)
    expected = runner.step(one_sequence([1, 2, 3, 4]))[3]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            runner.step(one_sequence([4], 3))
        except DeviceError as error:
            code = 0 if "fork" in str(error) else 2
        runner.close()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert (runner.step(one_sequence([4], 3)) == expected).all()
    runner.close()


@pytest.mark.parametrize("after_start", [False, True])
def test_an_interrupt_as_a_step_starts_leaves_nobody_waiting(runner, monkeypatch, after_start):
    """Ctrl-C may come at any bytecode: before all members are woken, before member 0 runs."""
    expected = runner.step(one_sequence([1, 2]))

    def interrupt(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    target = (runner, "_take_part") if after_start else (runner._team, "wake")
    monkeypatch.setattr(*target, interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.step(one_sequence([1, 2]))
    assert (runner.step(one_sequence([1, 2])) == expected).all()
