"""Names to files: a path, a known name, or ``org/repo:QUANT``; fetched, verified and cached.

>>> from headrace import hub
>>> path = hub.resolve("smollm2")          # downloads 93 MB the first time
"""

from headrace.hub.cache import Notice, Progress, cache_dir
from headrace.hub.catalogue import KnownModel, Part
from headrace.hub.names import CachedModel, cached_models, find_known, known_models, resolve

__all__ = [
    "CachedModel",
    "KnownModel",
    "Notice",
    "Part",
    "Progress",
    "cache_dir",
    "cached_models",
    "find_known",
    "known_models",
    "resolve",
]
