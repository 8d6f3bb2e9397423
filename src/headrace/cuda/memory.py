"""What a model takes on a device, before any of it is allocated."""

from __future__ import annotations

from typing import Any

from headrace.backend import PAGE_SIZE
from headrace.cuda import cache, sampling
from headrace.cuda.device import Device
from headrace.cuda.launchers import SampleShape
from headrace.cuda.lowering import Lowering
from headrace.cuda.runner import MAX_ROWS, best_options
from headrace.cuda.tuning import Tuning, tuning_for
from headrace.cuda.weights import WeightIndex
from headrace.model.decoder import Decoder


def plan(
    decoder: Decoder,
    device: Device,
    context: int,
    max_rows: int = MAX_ROWS,
    cache_type: str = "f16",
    tuning: Tuning | None = None,
    **options: Any,
) -> list[tuple[str, int]]:
    """(what, bytes) for one sequence of ``context`` positions; ``options``: the runner's (default:
    :func:`~headrace.cuda.runner.best_options`), ``tuning`` as well."""
    tuning = tuning or tuning_for(device)
    weights = WeightIndex(decoder)
    none = {"tensor_rows": None, "few_rows": range(0), "prompt_rows": 0, "one_kernel": False}
    wanted = none | (options or best_options(device, tuning=tuning))
    lowering = Lowering(
        decoder, device, weights, max_rows,
        floats=False, cache_type=cache_type, tuning=tuning, **wanted,
    )  # fmt: skip
    n_pages = -(-context // PAGE_SIZE)
    kv = cache.plan(lowering.cache_shapes, lowering.most_rows, n_pages)
    history = min(n_pages * PAGE_SIZE, decoder.config.context_length)
    sampler = sampling.plan(SampleShape(decoder.config.n_vocab), max_rows, history)
    return [
        ("weights, in tiles", weights.n_bytes),
        (f"activations and workspace of {lowering.most_rows} rows", lowering.arena.n_bytes),
        (f"KV cache of {n_pages:,} pages", kv.n_bytes),
        (f"sampling of {max_rows} rows", sampler.n_bytes),
        ("staging, while loading", weights.staging_bytes),
    ]
