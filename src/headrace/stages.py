"""What the parts of loading a model took, as records of this module's logger, at DEBUG.

``python bench/first_token.py MODEL --stages`` shows them; so does ``headrace serve --log-level
debug``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def stage(name: str, n_bytes: int | None = None) -> Iterator[None]:
    """Log ``name`` when the block has ended well, with its ``seconds`` and its ``bytes`` if given,
    in the record's ``facts``."""
    start = time.perf_counter()
    yield
    facts: dict[str, float] = {"seconds": round(time.perf_counter() - start, 4)}
    if n_bytes is not None:
        facts["bytes"] = n_bytes
    logger.debug(name, extra={"facts": facts})
