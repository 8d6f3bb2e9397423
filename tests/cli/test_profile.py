"""``headrace profile``: the table, the files it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_program import Headrace

REFERENCE = ("--device", "reference")


def test_the_table_says_where_the_time_goes(headrace: Headrace, tiny: str) -> None:
    result = headrace("profile", tiny, "-n", "4", "-d", "8", "--device", "cpu", "-t", "2")
    assert result.code == 0, result.err
    assert re.search(r"decode of 4 tokens at depth 8: .* each, [\d,]+ tok/s", result.out)
    assert re.search(r"reads [\d.]+ GB/s, computes [\d,]+ GFLOP/s int8 dot", result.out)
    for part in ("embedding, angles", "q/k/v matmul", "attention", "choice", "unattributed"):
        assert part in result.out
    for name in ("Macro", "Midi", "Micro", "token"):
        assert re.search(rf"^{name} +.*%", result.out, re.MULTILINE)
    assert re.search(r"^[A-Z][a-z ]+ (is|are) the limit", result.out, re.MULTILINE)
    assert "…" not in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_a_prompt_is_profiled_instead(headrace: Headrace, tiny: str) -> None:
    result = headrace("profile", tiny, "-p", "20", "-r", "2", "--json", *REFERENCE)
    facts = json.loads(result.out)
    assert (facts["mode"], facts["n_tokens"], facts["seconds"]["count"]) == ("prefill", 20, 2)


def test_report_and_trace_are_written(headrace: Headrace, tiny: str, tmp_path: Path) -> None:
    html, trace = tmp_path / "report.html", tmp_path / "trace.json"
    result = headrace(
        "profile", tiny, "-n", "2", *REFERENCE, "--html", str(html), "--trace", str(trace)
    )
    assert result.code == 0
    assert html.read_text().startswith("<!doctype html>")
    assert json.loads(trace.read_text())["traceEvents"]
    assert f"wrote {html}\nwrote {trace}\n" in result.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("-p", "8", "-n", "8"), "give one of them"),
        (("-r", "3"), "--prompt"),
        (("-n", "2", "-d", "4000"), "4002 positions, the model has a context of 2048"),
        (("--html", "/no/such/folder/report.html"), "there is no folder /no/such/folder"),
        (("-n", "0"), "--tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    headrace: Headrace, tiny: str, arguments: tuple[str, ...], complaint: str
) -> None:
    result = headrace("profile", tiny, *arguments, *REFERENCE)
    assert (result.code, result.out) == (1, "")
    assert complaint in result.err
    assert len(result.err.splitlines()) == 1


def test_the_python_api_gives_the_same_records(tiny: str) -> None:
    import headrace

    profile = headrace.profile_model(tiny, "reference", tokens=2)
    assert isinstance(profile, headrace.Profile)
    assert profile.subject.model == tiny
    assert len(profile.records) == len(profile.as_json()["records"])
    with pytest.raises(headrace.RequestError, match="tokens must be 1 or more, not 0"):
        headrace.profile_model(tiny, "reference", tokens=0)
