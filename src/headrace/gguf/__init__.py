"""The GGUF file: bounded reader, block layouts, dequantisation, writer."""

from headrace.gguf.quants import check_finite, dequantize
from headrace.gguf.reader import GGUFFile, open_gguf
from headrace.gguf.types import QuantType, Tensor

__all__ = ["GGUFFile", "QuantType", "Tensor", "check_finite", "dequantize", "open_gguf"]
