# ruff: noqa: N802 - the driver names its functions
"""The driver through ctypes, where it is a fake: what it answers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.cuda import compile as compiler
from headrace.cuda import context
from headrace.cuda.context import CUDAContext, device_count, usable_gpu
from headrace.errors import DeviceError, DeviceMemoryError


class FakeDriver:
    """One GPU of compute capability 9.0. ``statuses``: what functions return instead of success."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.retained = 0
        self.capability = {75: 9, 76: 0}

    def cuInit(self, flags: int) -> int:
        return self.statuses.get("cuInit", 0)

    def cuDeviceGetCount(self, count: Any) -> int:
        return self._write(count, 1)

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return self._write(device, index) if index < 1 else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        return self._write(value, self.capability[attribute])

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:
        name.value = b"NVIDIA Abacus"
        return 0

    def cuDevicePrimaryCtxRetain(self, handle: Any, device: int) -> int:
        if status := self.statuses.get("cuDevicePrimaryCtxRetain", 0):
            return status
        self.retained += 1
        return self._write(handle, 0x1234)

    def cuDevicePrimaryCtxRelease_v2(self, device: int) -> int:
        self.retained -= 1
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        return self._write(text, {2: b"out of memory", 101: b"invalid device ordinal"}[status])

    @staticmethod
    def _write(pointer: Any, value: Any) -> int:
        pointer._obj.value = value
        return 0


def use(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    monkeypatch.setattr(context, "_library", lambda: driver)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "13")


def test_a_context_is_kept_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    use(monkeypatch, driver)
    one = CUDAContext()
    assert (one.device, one.handle, driver.retained) == (0, 0x1234, 1)
    one.close()
    assert driver.retained == 0


def test_a_gpu_is_usable_if_it_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    use(monkeypatch, driver)
    assert usable_gpu() == "NVIDIA Abacus"
    assert context.arch(0) == 90
    driver.capability = {75: 7, 76: 5}
    assert usable_gpu() == "NVIDIA Abacus"
    driver.capability = {75: 7, 76: 0}
    assert usable_gpu() is None


def test_no_gpu_is_usable_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise DeviceError("no packages")

    use(monkeypatch, FakeDriver())
    monkeypatch.setattr(compiler, "compiler_version", fail)
    assert usable_gpu() is None


@pytest.mark.parametrize("driver", [None, FakeDriver(cuInit=999)])
def test_no_driver_or_a_broken_one_has_no_devices(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None
) -> None:
    use(monkeypatch, driver)
    assert device_count() == 0
    assert usable_gpu() is None
    with pytest.raises(DeviceError, match="0 are usable: check `nvidia-smi`"):
        CUDAContext()


@pytest.mark.parametrize(("status", "kind"), [(2, DeviceMemoryError), (101, DeviceError)])
def test_what_the_driver_refuses_is_said(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: type[DeviceError]
) -> None:
    use(monkeypatch, FakeDriver(cuDevicePrimaryCtxRetain=status))
    with pytest.raises(kind, match=rf"cuDevicePrimaryCtxRetain: .*\(CUDA error {status}\)"):
        CUDAContext()
