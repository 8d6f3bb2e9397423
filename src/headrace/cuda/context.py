"""The CUDA driver and a context on a GPU, through ctypes.

To make a context takes the driver a third of a second without the GIL, and to import NumPy and
NVIDIA's bindings takes Python as long: this module needs neither, so that they happen at once.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

from headrace.errors import DeviceError, DeviceMemoryError

OLDEST_ARCH = 75
"""Ten times the compute capability that the kernels need."""

_OUT_OF_MEMORY = 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@cache
def _library() -> Any:
    """The driver's library, or None."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None


def has_driver() -> bool:
    return _library() is not None


def _call(function: str, *arguments: Any) -> None:
    """DeviceError naming the function and the cause if it fails."""
    status = getattr(_library(), function)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        cause = text.value.decode() if text.value else "unknown error"
        kind = DeviceMemoryError if status == _OUT_OF_MEMORY else DeviceError
        raise kind(f"{function}: {cause} (CUDA error {status})")


def _integer(function: str, *arguments: Any) -> int:
    """What the function writes where its first argument points."""
    value = ctypes.c_int()
    _call(function, ctypes.byref(value), *arguments)
    return value.value


def device_count() -> int:
    """Usable CUDA devices: 0 without a driver, or with one that does not work."""
    if not has_driver() or _library().cuInit(0):
        return 0
    return _integer("cuDeviceGetCount")


def usable_gpu() -> str | None:
    """The name of the first GPU if the kernels can be compiled for it, and run there."""
    from headrace.cuda.compile import compiler_version

    try:
        if not device_count():
            return None
        device = _integer("cuDeviceGet", 0)
        compiler_version()
        return device_name(device) if arch(device) >= OLDEST_ARCH else None
    except DeviceError:
        return None


def device_name(device: int) -> str:
    name = ctypes.create_string_buffer(128)
    _call("cuDeviceGetName", name, len(name), device)
    return name.value.decode()


def arch(device: int) -> int:
    """Ten times the compute capability."""
    major = _integer("cuDeviceGetAttribute", _CAPABILITY_MAJOR, device)
    return 10 * major + _integer("cuDeviceGetAttribute", _CAPABILITY_MINOR, device)


class CUDAContext:
    """The context of GPU ``index``, made unless it is there; it stays at least until :meth:`close`.

    A :class:`headrace.cuda.gpu.CUDADevice` needs one and keeps it too. Raises DeviceError.
    """

    def __init__(self, index: int = 0) -> None:
        count = device_count()
        if index >= count:
            raise DeviceError(
                f"CUDA device {index} was asked for, and {count} are usable: check "
                "`nvidia-smi` and the driver, or use --device cpu"
            )
        self.device = _integer("cuDeviceGet", index)
        handle = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), self.device)
        self.handle = handle.value

    def close(self) -> None:
        _call("cuDevicePrimaryCtxRelease_v2", self.device)
