"""All layers of a token in one kernel: bit for bit what the launches it stands for give."""

from __future__ import annotations

from pathlib import Path

import batches
import numpy as np
import pytest

from headrace.cuda.host import HostDevice
from headrace.cuda.runner import CUDARunner
from headrace.cuda.token import AHEAD, WARPS, token_shape
from headrace.cuda.tuning import DEFAULTS, Tuning
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.synth import write_synthetic


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("synthetic")

    def get(shape: str, recipe: str):
        path = folder / f"{shape}-{recipe}.gguf"
        if not path.exists():
            write_synthetic(path, shape, recipe)
        return load_decoder(open_gguf(path))

    return get


def tokens_after(device: HostDevice, decoder, length: int, **options) -> np.ndarray:
    """Logits of three tokens, one at a time, after a prompt of ``length``."""
    runner = CUDARunner(decoder, device, max_rows=16, **options)
    runner.allocate_cache(batches.n_pages(length + 3))
    prompt = [int(i) for i in np.random.default_rng(length).integers(0, 200, length)]
    runner.step(batches.one_sequence(prompt, 0, [length - 1]))
    before = device.counters.kernel_launches
    logits = [runner.step(batches.one_sequence([7 + i], length + i, [0])) for i in range(3)]
    launches = (device.counters.kernel_launches - before) // 3
    assert launches == (3 if options.get("one_kernel") else 2 + 5 * decoder.config.n_layers)
    runner.close()
    return np.concatenate(logits)


@pytest.mark.parametrize(
    ("shape", "recipe", "sm_count", "length"),
    [
        ("llama-tiny", "Q4_K_M", 3, 2),
        ("llama-tiny", "Q4_K_M", 2, 300),  # splits, more of them than groups of warps
        ("llama-tiny", "Q8_0", 1, 130),
        ("qwen2-tiny", "Q5_K_M", 5, 70),  # biases
    ],
)
def test_as_the_launches(decoder_of, shape: str, recipe: str, sm_count: int, length: int) -> None:
    decoder = decoder_of(shape, recipe)
    wanted = tokens_after(HostDevice(sm_count=sm_count), decoder, length)
    got = tokens_after(HostDevice(sm_count=sm_count, seed=9), decoder, length, one_kernel=True)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("warps", "split", "length"), [(2, 64, 200), (4, 128, 300), (8, 64, 150)])
def test_with_other_warps_and_splits_of_attention(
    decoder_of, warps: int, split: int, length: int
) -> None:
    decoder, tuning = (
        decoder_of("llama-tiny", "Q4_K_M"),
        Tuning(attend_warps=warps, attend_split=split),
    )
    runner = CUDARunner(decoder, HostDevice(), one_kernel=True, tuning=tuning)
    shape = runner.executor.lowering.token
    assert shape is not None
    assert shape.constants["ATTEND_WARPS"] == warps
    assert shape.constants["SPLIT"] == split
    runner.close()
    wanted = tokens_after(HostDevice(sm_count=2), decoder, length, tuning=tuning)
    device = HostDevice(sm_count=2, seed=9)
    got = tokens_after(device, decoder, length, one_kernel=True, tuning=tuning)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("length", [3, 700])
def test_the_smallest_ring(decoder_of, length: int) -> None:
    """As many stages as are needed, and no more: all of them are filled many times."""
    decoder = decoder_of("llama-tiny", "Q4_K_M")
    device = HostDevice(sm_count=1, seed=3)
    wanted = tokens_after(HostDevice(sm_count=1), decoder, length)
    while token_shape(decoder, device) is not None:
        device.shared_limit -= 512
    device.shared_limit += 512
    shape = token_shape(decoder, device)
    assert shape is not None
    assert shape.constants["STAGES"] == AHEAD + max(WARPS, 2 * DEFAULTS.attend_warps - 2)
    got = tokens_after(device, decoder, length, one_kernel=True)
    np.testing.assert_array_equal(got, wanted)


def test_every_unit_has_one_block(decoder_of) -> None:
    decoder = decoder_of("llama-tiny", "Q4_K_M")
    shape = token_shape(decoder, HostDevice(sm_count=7))
    assert shape is not None
    first, last = shape.units[..., 0], shape.units[..., 1]
    assert (first[0] == 0).all()
    np.testing.assert_array_equal(first[1:], last[:-1])
    widths = [linear.n for linear in (shape.layers[0][2].out, shape.layers[0][3].gate)]
    assert last[-1, 0, 1:3].tolist() == [-(-n // 16) for n in widths]


@pytest.mark.parametrize(
    ("shape", "recipe", "arch"),
    [("llama-tiny", "Q4_K_M", 80), ("gemma3-tiny", "Q4_0", 90), ("llama-tiny", "F16", 90)],
)
def test_where_it_cannot_be(decoder_of, shape: str, recipe: str, arch: int) -> None:
    assert token_shape(decoder_of(shape, recipe), HostDevice(arch)) is None


def test_attention_of_more_warps_than_it_has_is_left_to_launches(
    decoder_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of("llama-tiny", "Q4_K_M")
    monkeypatch.setattr("headrace.cuda.token.WARPS", 6)
    assert token_shape(decoder, HostDevice(), Tuning(attend_warps=8)) is None
    assert token_shape(decoder, HostDevice(), Tuning(attend_warps=4)) is not None
