"""What a GPU's arithmetic can do, measured from registers."""

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
