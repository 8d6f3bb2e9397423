"""From an open GGUF file to a decoder."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from headrace.errors import ModelError
from headrace.gguf.quants import check_finite
from headrace.model.decoder import Decoder
from headrace.model.families import FAMILIES
from headrace.model.source import Source

if TYPE_CHECKING:
    from headrace.gguf.reader import GGUFFile


def load_decoder(file: GGUFFile, *, check_weights: bool = True) -> Decoder:
    """The decoder ``file`` holds: configuration, operations and zero-copy weights.

    check_weights: read all of the weights, to see that they are finite; False where a runner that
    looks at them as it takes them (``CUDARunner``) gets the decoder.

    Raises ModelError when the architecture is not supported, a value is out of range, or a tensor
    is missing, mis-shaped or without a role; GGUFError when a weight's scale is not finite.
    """
    source = Source(file.metadata, file.tensors)
    family = FAMILIES.get(source.architecture)
    if family is None:
        raise ModelError(
            f"architecture {source.architecture!r} is not supported; "
            f"headrace runs {', '.join(sorted(FAMILIES))}"
        )
    config, operations = family(source)
    weights = source.finish()
    if check_weights:
        check_finite(*weights.values())
    return Decoder(config, tuple(operations), MappingProxyType(weights))
