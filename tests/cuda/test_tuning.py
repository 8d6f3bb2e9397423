"""Constants of the kernels: their records, that every value of each is right, and the search."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest

from headrace.cuda import arguments as c
from headrace.cuda import tuning as tunings
from headrace.cuda.device import array
from headrace.cuda.gemm import SplitWork, gemm
from headrace.cuda.host import HostDevice
from headrace.cuda.launchers import CacheShape, attend, attend_warps
from headrace.cuda.layout import TileLayout
from headrace.cuda.memory import plan
from headrace.cuda.products import PLAIN, Activations, Matrix, matvec
from headrace.cuda.runner import CUDARunner, best_options
from headrace.cuda.skinny import skinny
from headrace.cuda.steps import Step
from headrace.cuda.tuning import ALLOWED, DEFAULTS, TUNED, Tuning, read_records, tuning_for
from headrace.cuda.weights import WeightIndex
from headrace.errors import DeviceError
from headrace.gguf.reader import open_gguf
from headrace.gguf.types import QuantType
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.synth import Shape, write_synthetic

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """One layer, of a type that skinny gives more warps for few rows."""
    path = tmp_path_factory.mktemp("tuning") / "tiny.gguf"
    write_synthetic(path, Shape("llama", 1, 256, 512, 4, 2, 64, 512, 2048, 5e5, 1e-5), "Q4_0")
    return load_decoder(open_gguf(path))


# Records


def test_the_records_are_valid() -> None:
    records = read_records()
    assert records["NVIDIA H100 80GB HBM3"].searched
    for one in records.values():
        assert len(one.date) == 10
        assert len(one.commit) == 40
        assert "bench/" in one.command
        assert set(one.searched) <= set(ALLOWED)
    for one in json.loads(TUNED.read_text()).values():
        assert set(one["constants"]) <= set(ALLOWED)


class Named(HostDevice):
    name = "NVIDIA Abacus"


def written(path: Path, **constants: Any) -> Path:
    record = {"constants": constants, "date": "", "commit": "", "command": "", "searched": []}
    path.write_text(json.dumps({Named.name: record}))
    return path


def test_a_gpu_has_its_record_and_an_unknown_one_the_defaults(
    tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuning_for(HostDevice()) == tuning_for(Named()) == DEFAULTS
    path = written(tmp_path / "t.json", attend_split=64, tensor_rows=4, few_last=0, prompt_rows=512)
    monkeypatch.setattr(tunings, "read_records", lambda: read_records(path))
    known = replace(DEFAULTS, attend_split=64, tensor_rows=4, few_last=0, prompt_rows=512)
    assert tuning_for(Named()) == known
    assert tuning_for(HostDevice()) == DEFAULTS
    options = best_options(Named())
    assert options == {"tensor_rows": 4, "few_rows": range(3, 1), "prompt_rows": 512}
    assert best_options(Named(), batch_invariant=True) == {"tensor_rows": 1, "prompt_rows": 512}
    runner = CUDARunner(decoder, Named(), **options)
    assert runner.executor.lowering.tuning == known
    runner.close()
    runner = CUDARunner(decoder, Named(), tuning=DEFAULTS)
    assert runner.executor.lowering.tuning == DEFAULTS
    runner.close()
    rows = {name for name, _ in plan(decoder, Named(), 64)}
    assert "activations and workspace of 512 rows" in rows
    rows = {name for name, _ in plan(decoder, Named(), 64, tuning=DEFAULTS)}
    assert "activations and workspace of 2048 rows" in rows


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ("attend_split", 96, "attend_split is one of 64, 128, 256, 512, 1024, not 96"),
        ("attend_warps", 3, "attend_warps is one of 2, 4, 8, not 3"),
        ("matvec_stages", True, "matvec_stages is one of 1, 2, 3, 4, not True"),
        ("matvec_exclusive", 1, "matvec_exclusive is one of False, True, not 1"),
        ("gemm_fill", 1, "gemm_fill is one of 0.5, 1.0, 1.3, 1.6, 2.0, not 1"),
        ("few_last", 17, "few_last is one of 0, 8, 12, 16, not 17"),
    ],
)
def test_other_values_are_refused(
    tmp_path: Path, constant: str, value: object, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        Tuning(**{constant: value})
    path = written(tmp_path / "t.json", **{constant: value})
    with pytest.raises(DeviceError, match=rf"{path}: .*{message}"):
        read_records(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {}}', '{"a": {"constants": {"b": 1}}}'])
def test_a_damaged_file_of_records_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(DeviceError, match=str(path)):
        read_records(path)


# Values

BIT_EQUAL = {
    "matvec_warps", "matvec_stages", "matvec_early", "matvec_exclusive", "skinny_warps",
    "skinny_ahead", "gemm_unpack", "prompt_rows",
}  # fmt: skip
ROUNDS = {"attend_warps", "attend_split", "gemm_fill"}
"""Of the same kernels; the order of sums changes."""
OTHER_KERNEL = {
    "few_first": lambda value: {n: "skinny" if n >= value else "matvec" for n in (2, 3, 7)},
    "few_last": lambda value: {n: "skinny" if n <= value else "gemm" for n in (9, 13)},
    "tensor_rows": lambda value: {17: "gemm" if value <= 17 else "matvec"},
}
"""Which then multiplies in steps of n rows."""
PRODUCTS = {"matvec", "skinny", "gemm"}

LENGTH = 331
"""Positions before the steps: several splits, the last page not full."""
STEPS = {
    "matvec_warps": (1,), "matvec_stages": (1,), "matvec_early": (1,), "matvec_exclusive": (1,),
    "attend_warps": (1, 3), "attend_split": (1, 3),
    "skinny_warps": (4, 9), "skinny_ahead": (4,),
    "few_first": (2, 3, 7), "few_last": (9, 13), "tensor_rows": (17,),
    "gemm_fill": (17,), "gemm_unpack": (17,), "prompt_rows": (),
}  # fmt: skip
"""The numbers of rows of steps that tell; besides the prompt."""


def outputs(decoder: Decoder, tuning: Tuning, steps: Iterable[int]) -> dict[str, Any]:
    """Logits of a prompt and then of steps, one row far into its sequence, the others at its
    start; and which kernel multiplied in them."""
    device = HostDevice(sm_count=3)
    options = best_options(device, tuning=tuning)
    runner = CUDARunner(decoder, device, max_rows=17, tuning=tuning, **options)
    runner.allocate_cache(32)
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, 500, LENGTH)]
    pages = list(range(batches.n_pages(LENGTH + 1)))
    found = {"prompt": runner.step(batches.one_sequence(tokens, 0, [0, LENGTH - 1], pages))}
    for n in steps:
        beside = [(i, 0, 9 + i) for i in range(1, n)]
        table = [pages, *([10 + i] for i in range(1, n))]
        batch = batches.rows([(0, LENGTH, 7), *beside], table, range(n))
        found[f"{n} rows"] = runner.step(batch)
        (found[f"kernel of {n}"],) = {one.kernel for one in runner.executor.ran} & PRODUCTS
    runner.close()
    return found


@pytest.fixture(scope="module")
def as_default(decoder: Decoder) -> dict[str, Any]:
    return outputs(decoder, DEFAULTS, sorted({n for steps in STEPS.values() for n in steps}))


def test_the_constants_are_all_here(as_default: dict[str, Any]) -> None:
    assert set(ALLOWED) == BIT_EQUAL | ROUNDS | set(OTHER_KERNEL) == set(STEPS)
    kernels = {n: as_default[f"kernel of {n}"] for n in (1, 2, 3, 4, 7, 9, 13, 17)}
    assert list(kernels.values()) == ["matvec"] * 3 + ["skinny"] * 4 + ["gemm"]


@pytest.mark.timeout(600)  # compiles
@pytest.mark.parametrize(
    ("constant", "value"),
    [
        (name, value)
        for name, values in ALLOWED.items()
        for value in values
        if value != getattr(DEFAULTS, name)
    ],
)
def test_every_value_is_right(
    decoder: Decoder, as_default: dict[str, Any], constant: str, value: Any
) -> None:
    steps = STEPS[constant]
    got = outputs(decoder, replace(DEFAULTS, **{constant: value}), steps)
    expected = OTHER_KERNEL.get(constant, lambda value: {})(value)
    for n in steps:
        assert got[f"kernel of {n}"] == expected.get(n, as_default[f"kernel of {n}"])
    for name in ("prompt", *(f"{n} rows" for n in steps)):
        if constant in BIT_EQUAL:
            np.testing.assert_array_equal(got[name], as_default[name])
        else:
            error = np.linalg.norm(got[name] - as_default[name]) / np.linalg.norm(as_default[name])
            assert error < (0.04 if constant in OTHER_KERNEL else 1e-3), name


def on_a_large_device(tuning: Tuning) -> list[object]:
    """What would be launched for matrices of about an 8B's size, and the runner's options."""
    device = HostDevice(sm_count=132)
    a = array(256, (4096, 4096), "f4")
    x = Activations(4096, 4096, a, a, a, a, a)
    out = [Matrix(256, TileLayout(QuantType.Q4_K, 4096, 4096))]
    taller = [[Matrix(256, TileLayout(QuantType.Q4_K, n, 4096))] for n in (5120, 6144, 28672)]
    work = SplitWork(256, 1 << 30, 256)
    how = {"macros": PLAIN, "tuning": tuning}
    launches = [
        *(matvec(device, one, x, c.Store(), 1, **how) for one in (out, taller[-1])),
        attend(
            device, CacheShape(32, 8, 128), c.Attend(), 1, 1024,
            scale=1, window=None, softcap=None, tuning=tuning,
        ),
        skinny(device, out, x, c.Store(), 4, **how),
        *(gemm(device, one, x, c.Store(), 32, work=work, **how) for one in taller),
        *(gemm(device, m, x, c.Store(), n, **how) for m in taller for n in range(64, 4096, 64)),
    ]  # fmt: skip
    made = [(one.spec, one.grid, one.threads, one.shared_bytes) for one in launches]
    return [*made, best_options(device, tuning=tuning)]


@pytest.mark.parametrize("constant", ALLOWED)
def test_every_value_launches_something_else(constant: str) -> None:
    different = [
        on_a_large_device(replace(DEFAULTS, **{constant: value})) for value in ALLOWED[constant]
    ]
    for i, one in enumerate(different):
        assert one not in different[:i], ALLOWED[constant][i]


def test_a_model_takes_the_constants_of_its_executor(decoder: Decoder) -> None:
    tuning = Tuning(
        matvec_warps=4, matvec_stages=1, matvec_exclusive=False, attend_warps=4, attend_split=64,
        skinny_warps=8, skinny_ahead=32, gemm_fill=0.5,
    )  # fmt: skip
    runner = CUDARunner(decoder, HostDevice(), tuning=tuning, few_rows=range(2, 5), tensor_rows=5)
    runner.allocate_cache(2)
    lowering = runner.executor.lowering
    found = {
        (name, key, value)
        for n in (1, 2, 5)
        for launch in lowering.launches(Step(n, 64, ((0, n),)))
        for name, constants in [(launch.spec.name, dict(launch.spec.macros))]
        for key, value in [*constants.items(), ("shared", launch.shared_bytes > 100 << 10)]
    }

    def values(kernel: str, key: str) -> set[object]:
        return {value for name, one, value in found if (name, one) == (kernel, key)}

    assert values("matvec", "WARPS") == {"4"}
    assert values("matvec", "STAGES") == {"1"}
    assert values("matvec", "shared") == {False}
    assert values("attend", "ATTEND_WARPS") == {"4"}
    assert values("attend", "SPLIT") == {"64"}
    assert values("skinny", "WARPS") == {"8"}
    assert values("skinny", "AHEAD") == {"4"}
    assert values("gemm", "SPLITS") == {"1"}  # two of d_ff's by default
    assert lowering.arena["split sums"].shape == (0,)  # so no room for their sums
    runner.close()


def test_attention_takes_the_warps_that_fit() -> None:
    """A constant found with one model must not stop another."""
    device, most = HostDevice(), Tuning(attend_warps=8)
    small, large = CacheShape(8, 1, 128), CacheShape(8, 1, 256)
    device.shared_limit = 64 << 10
    assert attend_warps(device, small, most) == 8
    assert attend_warps(device, large, most) == 4
    how = {"scale": 1, "window": None, "softcap": None, "tuning": most}
    launch = attend(device, large, c.Attend(), 1, 64, **how)
    assert launch.threads == 4 * 32
    assert dict(launch.spec.macros)["ATTEND_WARPS"] == "4"
    assert launch.shared_bytes <= device.shared_limit
    device.shared_limit = 16 << 10
    with pytest.raises(DeviceError, match="no attention of heads of 256 fits 16,384 bytes"):
        attend(device, large, c.Attend(), 1, 64, **how)


def test_executors_share_weights_and_leave_them(decoder: Decoder) -> None:
    device = HostDevice()
    weights = WeightIndex(decoder)
    weights.load(device)
    free = device.free_bytes()
    results = []
    for tuning in (DEFAULTS, replace(DEFAULTS, attend_split=64)):
        runner = CUDARunner(decoder, device, max_rows=2, tuning=tuning, weights=weights)
        runner.allocate_cache(1)
        results.append(runner.step(batches.one_sequence([3, 4], 0, [1])))
        runner.close()
        assert device.free_bytes() == free
    np.testing.assert_array_equal(*results)
    weights.close(device)
    assert device.free_bytes() > free
