# ruff: noqa
"""What the prototypes share."""

from pathlib import Path

import numpy as np

from headrace.backend import PAGE_SIZE, Batch
from headrace.cuda.steps import Step


class Patch:
    """Replaces text of a copy of the kernels that is there once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, *pairs: tuple[str, str]) -> None:
        path = self._folder / name
        text = path.read_text()
        for old, new in pairs:
            assert text.count(old) == 1, (name, text.count(old), old)
            text = text.replace(old, new)
        path.write_text(text)


def launches_at(executor, depth: int):
    """Of a token after `depth` positions, brought, without the choice."""
    at = np.array([depth], np.int32)
    pages = np.arange(depth // PAGE_SIZE + 1, dtype=np.int32)[None]
    executor.bring(Batch(at * 0 + 1, at, at * 0, pages, at * 0))
    return executor.lowering.launches(Step(1, 1 << depth.bit_length(), ((0, 1),)))


def graph_of(device, launches):
    device.prepare(one.spec for one in launches)

    def record() -> None:
        for one in launches:
            device.launch(one)

    return device.capture(record)
