"""The device under test: the host build of three generations' code paths, or the GPU (-m gpu)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.cuda.device import Device
from headrace.cuda.host import HostDevice


@pytest.fixture(
    params=["host-90", "host-80", "host-75", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def any_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every code path of the primitives."""
    yield from _device(request.param)


@pytest.fixture(params=["host-90", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    yield from _device(request.param)


@pytest.fixture(params=["host-90", "host-80", pytest.param("gpu", marks=pytest.mark.gpu)])
def tensor_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every code path of the tensor cores."""
    yield from _device(request.param)


@pytest.fixture(params=[False, True], ids=["f16", "q8_0"])
def quantised(request: pytest.FixtureRequest) -> bool:
    """Both kinds of KV cache."""
    return request.param


def _device(name: str) -> Iterator[Device]:
    if name == "gpu":
        from headrace.cuda.gpu import CUDADevice

        made: Device = CUDADevice()
    else:
        made = HostDevice(arch=int(name.removeprefix("host-")))
    yield made
    made.close()
