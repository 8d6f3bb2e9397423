"""Where the time of a token goes: every part of every operation, its cost, and the roofline.

>>> import headrace
>>> profile = headrace.profile_model("smollm2")
>>> print(profile.bottleneck.sentence)
>>> profile.write_html("report.html")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.profile.result import Profile


def profile_model(
    model: str | os.PathLike[str],
    device: str = "auto",
    *,
    tokens: int = 32,
    prompt: int = 0,
    depth: int = 0,
    repetitions: int = 5,
    threads: int | None = None,
    label: str | None = None,
    notice: Callable[[str], None] = lambda what: None,
) -> Profile:
    """Load a model and profile it; see ``headrace profile``.

    tokens: decoded one by one after ``depth`` cached positions, each twice: with time stamps and
    without. prompt: instead, a prompt of that many tokens, ``repetitions`` times. label: what to
    call the model in reports. notice: called with what begins. Raises DeviceError for a device that
    cannot be profiled, RequestError for a number out of range, and what loading raises.
    """
    from headrace import hub
    from headrace.devices import choose_device, load_runner
    from headrace.errors import RequestError
    from headrace.gguf import open_gguf
    from headrace.model import load_decoder
    from headrace.profile.measure import profile_runner
    from headrace.profile.record import Subject

    for option, value, least in (
        ("tokens", tokens, 1),
        ("prompt", prompt, 0),
        ("depth", depth, 0),
        ("repetitions", repetitions, 1),
    ):
        if value < least:
            raise RequestError(f"{option} must be {least} or more, not {value}")
    device = choose_device(device, threads)
    path = hub.resolve(model)
    notice("loading (the first run compiles kernels)")
    with open_gguf(path) as file:
        decoder = load_decoder(file)
        runner = load_runner(decoder, device, threads=threads)
        try:
            subject = Subject(
                model=label or str(model),
                architecture=decoder.config.architecture,
                device=runner.device_name,
                size=file.n_bytes,
                parameters=sum(tensor.n_rows * tensor.k for tensor in decoder.weights.values()),
            )
            return profile_runner(
                runner, subject, tokens=tokens, prompt=prompt, depth=depth,
                repetitions=repetitions, notice=notice,
            )  # fmt: skip
        finally:
            runner.close()
