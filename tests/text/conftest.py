"""The three real vocabularies."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.gguf.reader import open_gguf
from headrace.text.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data" / "tokenise"
GOLDEN = ("smollm2", "gemma3", "deepseek-r1-qwen")


def golden_cases(name: str) -> list[dict[str, Any]]:
    """What llama.cpp made of awkward strings: text, plain ids, ids with control tokens parsed."""
    cases: list[dict[str, Any]] = json.loads((DATA / f"{name}.json").read_text())["tokenise"]
    return cases


def _metadata_of(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        return {
            key: value.copy() if isinstance(value, np.ndarray) else value
            for key, value in file.metadata.items()
        }


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> dict[str, Any]:
    return _metadata_of(smollm2_path)


@pytest.fixture(scope="session")
def gemma3_metadata(gemma3_path: Path) -> dict[str, Any]:
    return _metadata_of(gemma3_path)


@pytest.fixture(scope="session")
def deepseek_metadata() -> dict[str, Any]:
    with lzma.open(DATA / "deepseek-r1-qwen.metadata.json.xz") as file:
        metadata: dict[str, Any] = json.load(file)
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], "i4")
    return metadata


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(smollm2_metadata)


@pytest.fixture(scope="session")
def gemma3(gemma3_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(gemma3_metadata)


@pytest.fixture(scope="session")
def deepseek(deepseek_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(deepseek_metadata)


@pytest.fixture(params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> tuple[Tokenizer, list[dict[str, Any]]]:
    fixture = {"deepseek-r1-qwen": "deepseek"}.get(request.param, request.param)
    return request.getfixturevalue(fixture), golden_cases(request.param)
