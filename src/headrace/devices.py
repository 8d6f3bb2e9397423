"""Which backend runs a model: the one place that knows all of them by name."""

from __future__ import annotations

from headrace.backend import Runner
from headrace.errors import DeviceError
from headrace.model.decoder import Decoder

DEVICES = ("cpu", "cuda", "reference")


def choose_device(device: str) -> str:
    """The device that ``"auto"`` means here; DeviceError for one that there is not."""
    if device == "auto":
        return "cpu"
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}: use 'auto', {', '.join(map(repr, DEVICES))}")
    return device


def load_runner(decoder: Decoder, device: str, threads: int | None = None) -> Runner:
    """Load ``decoder`` on ``device``: ``"reference"``, ``"cpu"`` or ``"cuda"``."""
    if device == "reference":
        from headrace.reference.runner import ReferenceRunner

        return ReferenceRunner(decoder)
    if device == "cpu":
        from headrace.cpu.runner import CPURunner

        return CPURunner(decoder, threads=threads)
    if device == "cuda":
        from headrace.cuda.runner import CUDARunner

        return CUDARunner(decoder)
    raise DeviceError(f"unknown device {device!r}: use one of {', '.join(map(repr, DEVICES))}")
