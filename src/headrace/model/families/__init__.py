"""The model families: each lists a decoder's operations from a file's metadata and tensors."""

from __future__ import annotations

from collections.abc import Callable

from headrace.model.decoder import Config
from headrace.model.families.gemma2 import gemma2
from headrace.model.families.gemma3 import gemma3
from headrace.model.families.llama import llama
from headrace.model.families.phi3 import phi3
from headrace.model.families.qwen import qwen2, qwen3
from headrace.model.operations import Operation
from headrace.model.source import Source

Family = Callable[[Source], tuple[Config, list[Operation]]]

FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "llama": llama,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
"""``general.architecture`` -> the family that builds it."""
