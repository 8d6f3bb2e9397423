"""The folder where everything is kept, and how people hear of what is being fetched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, bytes done, bytes in all)`` while something is fetched."""

Notice = Callable[[str], None]
"""Called with one line a person should see, such as the licence of a model being fetched."""


def cache_dir() -> Path:
    """The folder for everything headrace keeps: ``$HEADRACE_CACHE``, or the user's cache folder."""
    if given := os.environ.get("HEADRACE_CACHE"):
        return Path(given).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("headrace")
