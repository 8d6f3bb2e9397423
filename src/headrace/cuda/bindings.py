"""NVIDIA's Python packages, imported when they are needed, by one thread at a time: threads that
import them at once see half of them. DeviceError, which says how to install them, without them."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from headrace.errors import DeviceError

_IMPORTING = threading.Lock()


def driver() -> Any:
    return _import("cuda.bindings.driver")


def nvrtc() -> Any:
    return _import("cuda.bindings.nvrtc")


def core() -> Any:
    return _import("cuda.core")


def _import(name: str) -> Any:
    try:
        with _IMPORTING:
            return importlib.import_module(name)
    except ImportError as cause:
        raise not_installed() from cause


def not_installed() -> DeviceError:
    return DeviceError(
        "the CUDA backend needs NVIDIA's Python packages: pip install 'headrace[cuda]'"
    )
