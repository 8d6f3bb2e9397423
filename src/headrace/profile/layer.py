"""One layer, timed and accounted for: the records of :meth:`headrace.cuda.Executor.time_layer`."""

from __future__ import annotations

from typing import Any, Protocol

from headrace.backend import Batch
from headrace.errors import RequestError
from headrace.instrument import Formats, Span
from headrace.model.decoder import Decoder
from headrace.profile.cost import Rows, cost
from headrace.profile.record import Group, Record, Timing


class LayerTimer(Protocol):
    """What an executor offers."""

    decoder: Decoder
    batch: Batch | None

    @property
    def formats(self) -> Formats: ...

    def upload(self, values: Any) -> Any: ...

    def time_layer(self, x: Any, layer: int) -> list[Span]: ...


def profile_layer(executor: LayerTimer, x: Any, layer: int, repetitions: int = 10) -> Group:
    """``layer`` over the rows brought last, ``repetitions`` times from the same x float32 [rows, d]
    (NumPy). The group's records have the level, cost and times of each kernel; the group sums up.

    >>> layer = profile_layer(executor, x, 0)
    >>> layer.bytes_per_second, layer.roofline_share(instrument.ceilings())
    """
    if repetitions < 1:
        raise RequestError(f"repetitions must be 1 or more, not {repetitions}")
    executor.time_layer(executor.upload(x), layer)  # compiles
    runs = [executor.time_layer(executor.upload(x), layer) for _ in range(repetitions)]
    assert executor.batch is not None
    rows, operations = Rows.of(executor.batch), executor.decoder.operations
    records = []
    for spans in zip(*runs, strict=True):
        part = spans[0].part
        op = operations[part.operation]
        records.append(
            Record(
                operation=type(op).__name__,
                layer=layer,
                part=part,
                cost=cost(executor.decoder, op, part.works, executor.formats, rows),
                seconds=Timing(tuple(span.end - span.start for span in spans)),
                waiting=Timing(tuple(span.waiting for span in spans)),
            )
        )
    return Group(f"layer {layer}", tuple(records))
