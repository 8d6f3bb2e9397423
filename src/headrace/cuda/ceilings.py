"""What a GPU can do, measured: plain reading of its memory, and arithmetic from registers."""

from __future__ import annotations

from headrace.cuda import launchers
from headrace.cuda.device import Device, Launch
from headrace.cuda.stamps import DOTS, FMAS, TENSORS


def flops_per_second(device: Device, sink: int) -> dict[str, float]:
    """Multiplications and additions a second, by kind of arithmetic; the best of five runs.

    ``sink``: the address of four bytes that may be overwritten.
    """
    kinds = {DOTS: "DOTS", FMAS: "FMAS"} | ({TENSORS: "TENSORS"} if device.arch >= 80 else {})
    rates = {}
    for kind, name in kinds.items():
        launch, operations = launchers.peak(device, sink, name)
        device.launch(launch)

        def run(x: Launch = launch) -> None:
            device.launch(x)

        rates[kind] = operations / min(device.elapsed(run) for _ in range(5))
    return rates


def read_bandwidth(device: Device, repeats: int = 10) -> float:
    """Bytes a second of a plain read kernel over four times the L2 cache and more: the best of
    ``repeats``. Takes up to a quarter of the free memory meanwhile, 4 GB at most."""
    n_bytes = min(4 << 30, device.free_bytes() // 4) // 4096 * 4096
    address = device.allocate(n_bytes, "measuring the read bandwidth")
    try:
        launch = launchers.read(device, address, n_bytes, address)
        device.clear(address, n_bytes)
        device.launch(launch)
        return n_bytes / min(device.elapsed(lambda: device.launch(launch)) for _ in range(repeats))
    finally:
        device.synchronise()
        device.free(address)
