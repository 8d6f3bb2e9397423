"""Every error the library raises on purpose. Catch :class:`HeadraceError` to catch them all.

A message says what was wrong, with the numbers, and what to do about it.
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base class of all headrace errors."""


class GGUFError(HeadraceError):
    """Not a GGUF that this reader accepts. The message names the key or tensor and the offset."""


class TokenizerError(HeadraceError):
    """The tokeniser metadata is missing, malformed or of an unsupported kind."""


class TemplateError(HeadraceError):
    """A chat template is missing, refused the messages, or exceeded its time or memory limit."""


class ModelError(HeadraceError):
    """The architecture is unsupported, or its metadata and tensors do not make a complete model."""


class ContextOverflowError(HeadraceError):
    """The prompt plus the tokens asked for do not fit the context length."""


class RequestError(HeadraceError):
    """A generation parameter is out of range or contradicts another. The message names it."""


class DeviceError(HeadraceError):
    """A device operation failed. The message carries the operation, the sizes and the cause."""


class DeviceMemoryError(DeviceError):
    """Out of memory. The message carries the bytes wanted, the bytes free and what to change."""


class HubError(HeadraceError):
    """A model could not be named, fetched or verified."""
