"""headrace: runs GGUF-quantised language models at the speed of memory.

>>> import headrace
>>> model = headrace.load("smollm2")
>>> model.generate("The capital of France is", max_tokens=32, temperature=0).text
>>> for piece in model.stream("Once upon a time"):
...     print(piece, end="")
>>> model.chat([{"role": "user", "content": "Hello"}]).text

What needs NumPy is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headrace.errors import (
    ContextOverflowError,
    DeviceError,
    DeviceMemoryError,
    GGUFError,
    HeadraceError,
    HubError,
    ModelError,
    RequestError,
    TemplateError,
    TokenizerError,
)

if TYPE_CHECKING:
    from headrace.api import Model, Options, TextStream
    from headrace.engine.request import Completion, Timings
    from headrace.loading import load
    from headrace.profile import profile_model
    from headrace.profile.result import Profile
    from headrace.sampling import SamplingParams, TokenLogprob

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "ContextOverflowError",
    "DeviceError",
    "DeviceMemoryError",
    "GGUFError",
    "HeadraceError",
    "HubError",
    "Model",
    "ModelError",
    "Options",
    "Profile",
    "RequestError",
    "SamplingParams",
    "TemplateError",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "TokenizerError",
    "load",
    "profile_model",
]

_LAZY = {
    "Completion": "headrace.engine.request",
    "Model": "headrace.api",
    "Options": "headrace.api",
    "Profile": "headrace.profile.result",
    "SamplingParams": "headrace.sampling",
    "TextStream": "headrace.api",
    "Timings": "headrace.engine.request",
    "TokenLogprob": "headrace.sampling",
    "load": "headrace.loading",
    "profile_model": "headrace.profile",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
