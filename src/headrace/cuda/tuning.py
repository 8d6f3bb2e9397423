"""Constants of the kernels that depend on the GPU: what they may be, and what was found for which.

``bench/tune.py`` searches for them on a device, and keeps what it finds in ``tuned.json``
(docs/decisions/018).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from headrace.cuda.device import Device
from headrace.errors import DeviceError

TUNED = Path(__file__).with_name("tuned.json")


def _one_of(default: Any, *allowed: Any) -> Any:
    return field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class Tuning:
    """Each may be one of :data:`ALLOWED`; DeviceError for anything else. Where a device or a model
    has no room for what is asked for, a kernel takes the most that fits. What a constant changes
    besides the speed is said beside it: nothing, or how sums round."""

    matvec_warps: int = _one_of(16, 4, 8, 12, 16, 24)
    """Warps of a block of ``matvec``: 4, 8, 12, 16 or 24 (of 32, some spill
    registers). Changes no bit."""
    matvec_stages: int = _one_of(3, 1, 2, 3, 4)
    """Tiles that each of its warps has under way, at most: 1 to 4; of warps with few tiles 2.
    Changes no bit."""
    matvec_early: int = _one_of(2, 0, 1, 2)
    """Of them, those that are asked for before the kernel before has ended, at most: 0, 1 or 2; the
    others, behind x. Changes no bit."""
    matvec_exclusive: bool = _one_of(True, False, True)
    """Ask for over half of a multiprocessor's shared memory, so that one block has it alone: with
    two, the kernels of a chain of programmatic launches get in each other's way. From sm_90 on.
    Changes no bit."""
    attend_warps: int = _one_of(8, 2, 4, 8)
    """Warps of a block of ``attend``, of 32 positions each at a time: 2, 4 or 8 (12 would spill
    registers). Changes the order of sums."""
    attend_split: int = _one_of(256, 64, 128, 256, 512, 1024)
    """Positions of a split of ``attend``, at least: 64, 128, 256, 512 or 1,024; whole pages.
    Changes the order of sums."""
    few_first: int = _one_of(4, 2, 3, 4, 5, 6, 7, 8)
    """Steps of so many rows at least go through ``skinny``: 2 to 8. Changes which kernel."""
    few_last: int = _one_of(16, 0, 8, 12, 16)
    """And of so many at most: 8, 12 or 16; 0: none do. Changes which kernel."""
    skinny_warps: int = _one_of(16, 8, 16)
    """Warps of a block of ``skinny`` up to 8 rows, where the types are Q4_0, Q4_1 or Q4_K, from
    sm_90 on: 8 or 16. Changes no bit."""
    skinny_ahead: int = _one_of(16, 0, 16, 32, 48)
    """Tiles of 16 x 256 weights that its warps together have asked L2 for: 0, 16, 32 or 48 (16 of
    Q4_K are 37 KB). Changes no bit."""
    tensor_rows: int = _one_of(8, 2, 4, 8, 16, 32)
    """Steps of so many rows or more, if they are not skinny's, go through ``gemm``: 2, 4, 8, 16 or
    32. Changes which kernel."""
    gemm_fill: float = _one_of(1.3, 0.5, 1.0, 1.3, 1.6, 2.0)
    """Blocks for each multiprocessor below which the columns of a matrix are split among several,
    in steps that are no prompt: 0.5, 1.0, 1.3, 1.6 or 2.0. Changes the order of sums."""
    gemm_unpack: int = _one_of(48, 16, 32, 48, 64, 96)
    """Unpacking 128 rows of weights takes as long as multiplying them with so many rows of x: 16,
    32, 48, 64 or 96. By it a prompt's rows are cut into blocks. Changes no bit."""
    prompt_rows: int = _one_of(2048, 256, 512, 1024, 1536, 2048, 4096)
    """Rows of a prompt at a time: 256, 512, 1,024, 1,536, 2,048 or 4,096. Those who generate wait
    for them, and the workspace grows with them. Changes no bit."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), one.metadata["allowed"]
            if value not in allowed or type(value) is not type(one.default):
                few = ", ".join(map(repr, allowed))
                raise DeviceError(f"tuning: {one.name} is one of {few}, not {value!r}")

    @property
    def few_rows(self) -> range:
        """The numbers of rows whose steps go through ``skinny``."""
        return range(self.few_first, self.few_last + 1)


ALLOWED: Mapping[str, tuple[Any, ...]] = {
    one.name: one.metadata["allowed"] for one in fields(Tuning)
}
"""The values of each constant, in order."""

DEFAULTS = Tuning()


@dataclass(frozen=True)
class Record:
    """What was found for a GPU, and where it comes from. ``searched``: the constants whose
    candidates ``command`` measured to their end; the others are as they were before it."""

    tuning: Tuning
    date: str
    commit: str
    command: str
    searched: tuple[str, ...]


def read_records(path: Path = TUNED) -> dict[str, Record]:
    """By the GPU's name. DeviceError names the file and what is wrong in it."""
    try:
        return {
            name: Record(
                Tuning(**one["constants"]), one["date"], one["commit"], one["command"],
                tuple(one["searched"]),
            )
            for name, one in json.loads(path.read_text()).items()
        }  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError, DeviceError) as cause:
        raise DeviceError(f"{path}: no records of tuning: {cause}") from cause


def tuning_for(device: Device) -> Tuning:
    """The record of the device's name; for a GPU that has none, the defaults.

    The defaults were the best on H100s with Llama shapes of 8B and 1B in Q4_K_M, found by hand and
    by the search, but for ``matvec_exclusive``, without which an H200 was much slower
    (docs/decisions/012, 014, 015 and 018). On no other GPU was any of them measured: what is sane
    about them elsewhere is that each kernel takes the most of it that fits, and that tests run all
    of them on the host.
    """
    record = read_records().get(device.name)
    return record.tuning if record else DEFAULTS
