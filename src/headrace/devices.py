"""Which backend runs a model: the one place that knows all of them by name.

Nothing large is imported before it is needed: a GPU is opened meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headrace.errors import DeviceError, RequestError
from headrace.stages import stage

if TYPE_CHECKING:
    from headrace.backend import Runner
    from headrace.cuda.context import CUDAContext
    from headrace.model.decoder import Decoder

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda", "reference")


def choose_device(device: str, threads: int | None = None) -> str:
    """The device that ``"auto"`` means here; DeviceError for one that there is not.

    It means a usable GPU, and says so (a warning of this module's logger: on stderr, unless logging
    is set up otherwise), or else the CPU. ``threads``, if given, are the CPU's.
    """
    if device == "auto":
        gpu = None if threads is not None else _gpu_name()
        if gpu is None:
            return "cpu"
        logger.warning("using %s; --device cpu (device='cpu') for the CPU", gpu)
        return "cuda"
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}: use 'auto', {', '.join(map(repr, DEVICES))}")
    if device == "cuda" and threads is not None:
        raise DeviceError("threads are the CPU's: leave them out with the device 'cuda'")
    return device


def _gpu_name() -> str | None:
    """The GPU that device ``"cuda"`` would use, or None if it would find none it can use."""
    from headrace.cuda.context import usable_gpu

    return usable_gpu()


def check_cache_type(cache_type: str, device: str) -> None:
    """RequestError for a type of keys and values that there is not, DeviceError for one that a
    chosen device does not keep them as."""
    from headrace.backend import CACHED_BYTES

    if cache_type not in CACHED_BYTES:
        raise RequestError(
            f"cache_type must be one of {', '.join(CACHED_BYTES)}, not {cache_type!r}"
        )
    if cache_type != "f16" and device == "cpu":
        raise DeviceError(
            f"the CPU backend keeps its cache in f16: leave out --cache-type {cache_type} "
            f"(cache_type={cache_type!r}), or use a GPU (--device cuda)"
        )


@contextmanager
def opening(device: str) -> Iterator[None]:
    """Begin to open ``device`` ("auto": the GPU, if there is one) and to import NVIDIA's packages,
    so that :func:`load_runner` need not wait as long for them.

    Nothing is raised here if that fails: whoever needs the device will be told why.
    """
    from headrace.cuda.context import has_driver

    if device not in ("auto", "cuda") or not has_driver():
        yield
        return
    with ThreadPoolExecutor(2, "headrace-device") as threads:
        context = threads.submit(_make_context)
        threads.submit(_import_bindings)
        try:
            yield
        finally:  # a runner that was loaded keeps it
            if context.exception() is None:
                context.result().close()


def _make_context() -> CUDAContext:
    from headrace.cuda.context import CUDAContext

    with stage("context"):
        return CUDAContext()


def _import_bindings() -> None:
    """Neither NumPy nor what other threads import meanwhile: they could see half of it."""
    with stage("bindings imported"):
        from headrace.cuda import bindings
        from headrace.cuda.compile import compiler_version

        bindings.driver()
        compiler_version()


def load_runner(
    decoder: Decoder, device: str, threads: int | None = None, max_sequences: int = 1,
    *, batch_invariant: bool = False, cache_type: str = "f16",
    progress: Callable[[int], None] | None = None,
) -> Runner:  # fmt: skip
    """Load ``decoder`` on ``device``: ``"reference"``, ``"cpu"`` or ``"cuda"``.

    ``max_sequences``: as many at least generate in one step. ``batch_invariant``: a sequence is the
    same, bit for bit, however many others generate beside it; a GPU takes one way for all numbers
    of rows then, and is slower for few. The CPU has but one way. ``cache_type``: keys and values
    as ``"f16"``, or on a GPU ``"q8_0"``, in about half the memory. ``progress`` is told the bytes
    of weights as they go to a GPU.
    """
    check_cache_type(cache_type, device)
    if device == "reference":
        from headrace.reference.runner import ReferenceRunner

        return ReferenceRunner(decoder, cache_type=cache_type)
    if device == "cpu":
        from headrace.cpu.runner import CPURunner

        return CPURunner(decoder, threads=threads)
    if device == "cuda":
        from headrace.cuda.gpu import CUDADevice
        from headrace.cuda.runner import MAX_ROWS, CUDARunner, best_options

        with stage("device opened, its context waited for"):
            gpu: Any = CUDADevice()
        rows = max(MAX_ROWS, max_sequences)
        options = best_options(gpu, batch_invariant=batch_invariant)
        return CUDARunner(
            decoder, gpu, max_rows=rows, cache_type=cache_type, progress=progress, **options
        )
    raise DeviceError(f"unknown device {device!r}: use one of {', '.join(map(repr, DEVICES))}")


def memory_plan(
    decoder: Decoder, device: str, context: int, cache_type: str = "f16"
) -> list[tuple[str, int]]:
    """(what, bytes) of all that a model of ``context`` positions takes on a GPU, nothing allocated.

    DeviceError for a device that has no plan.
    """
    if device != "cuda":
        raise DeviceError(f"there is no memory plan for the device {device!r}: only for 'cuda'")
    from headrace.cuda.gpu import CUDADevice
    from headrace.cuda.memory import plan

    gpu: Any = CUDADevice()
    try:
        return plan(decoder, gpu, context, cache_type=cache_type)
    finally:
        gpu.close()
