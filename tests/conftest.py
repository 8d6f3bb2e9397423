"""Fixtures shared by all tests: the two real models, fetched on first use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# What a shell starts in the background ignores Ctrl-C, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _real_model(variable: str, name: str) -> Path:
    """A real model's path. Fetched (never skipped) so that CI cannot pass without it."""
    if given := os.environ.get(variable):
        return Path(given)
    from headrace import hub

    return Path(hub.resolve(name))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1 (98 MB)."""
    return _real_model("HEADRACE_TEST_SMOLLM2", "smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M Q4_K_M (253 MB)."""
    return _real_model("HEADRACE_TEST_GEMMA3", "gemma3:270m")
