"""What the documents promise: links that lead somewhere, and the keys of ``--json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_program import Headrace

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
SECTIONS = dict(
    section.split("\n", 1) for section in (ROOT / "docs/json.md").read_text().split("\n## ")[1:]
)
DEVICE = ("--device", "reference")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("run", ("{tiny}", "hi", "-n", "3", *DEVICE)),
        ("info", ("{tiny}",)),
        ("models", ()),
        ("pull", ("{tiny}",)),
        ("synth", ("llama-tiny", "Q8_0", "-o", "{folder}/new.gguf")),
        ("bench", ("{tiny}", "-p", "8", "-n", "2", "-r", "1", *DEVICE)),
        ("profile", ("{tiny}", "-n", "2", *DEVICE)),
        ("ppl", ("{tiny}", "-c", "64", *DEVICE)),
    ],
)
def test_every_key_of_json_is_documented(
    headrace: Headrace, tiny: str, tmp_path: Path, command: str, arguments: tuple[str, ...]
) -> None:
    given = (argument.format(tiny=tiny, folder=tmp_path) for argument in arguments)
    result = headrace(command, *given, "--json")
    assert result.code == 0, result.err
    documented = set(re.findall(r"`(\w+)`", SECTIONS[command]))
    assert set(keys(json.loads(result.out))) - documented == set()


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from keys(inner)
