"""A model as data: configuration, the seven operations and the weights they name."""

from headrace.model.decoder import Config, Decoder
from headrace.model.loader import load_decoder

__all__ = ["Config", "Decoder", "load_decoder"]
