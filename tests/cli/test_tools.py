"""info, models, pull, synth, bench and ppl."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_program import Headrace

import headrace as library
from headrace import bench
from headrace.gguf import open_gguf


def test_the_program_names_itself_and_its_commands(headrace: Headrace) -> None:
    assert headrace("--version").out == f"headrace {library.__version__}\n"
    shown = headrace("--help")
    assert shown.code == 0
    for command in ("run", "chat", "info", "pull", "models", "bench", "ppl", "synth"):
        assert re.search(rf"\b{command}\b", shown.out)
        assert headrace(command, "-h").code == 0


def test_info_adds_up(headrace: Headrace, tiny: str) -> None:
    facts = json.loads(headrace("info", tiny, "--json", "-c", "100").out)
    with open_gguf(tiny) as file:
        tensors = file.tensors
        assert facts["size"] == Path(tiny).stat().st_size
        assert sum(row["bytes"] for row in facts["tensors"]) == sum(
            tensor.n_bytes for tensor in tensors.values()
        )
        # Every weight but the embedding, of which one row is read.
        table = tensors["token_embd.weight"]
        expected = sum(tensor.n_bytes for tensor in tensors.values()) - table.n_bytes
        assert facts["weight_bytes_per_token"] == expected + table.n_bytes // table.n_rows
    config = facts["config"]
    assert (config["n_layers"], config["n_kv_heads"], config["head_dim"]) == (3, 2, 64)
    position = 3 * 2 * 64 * 2 * 2  # layers, heads, width, keys and values, half precision
    assert facts["kv_bytes_per_position"] == position
    assert [row["context"] for row in facts["memory"]] == [100, 2048]
    assert facts["memory"][0]["kv_cache"] == 100 * position
    assert facts["chat_template"] is True

    text = headrace("info", tiny).out
    for shown in ("architecture   llama", "Q8_0", "Memory at a context length", "2,048"):
        assert shown in text


def test_models_lists_what_is_known_and_what_is_here(headrace: Headrace, empty_cache: Path) -> None:
    rows = {row["name"]: row for row in json.loads(headrace("models", "--json").out)}
    assert list(rows) == ["smollm2", "gemma3:270m"]
    assert rows["smollm2"]["path"] is None
    assert rows["gemma3:270m"]["terms"] == "https://ai.google.dev/gemma/terms"
    (empty_cache / "models").mkdir(parents=True)
    model = empty_cache / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    with model.open("wb") as file:
        file.truncate(98_362_432)  # sparse
    text = headrace("models").out
    assert re.search(r"smollm2 +98.36 MB +yes +Apache-2.0", text)
    assert re.search(r"gemma3:270m +253.1 MB +no +Gemma Terms of Use", text)


def test_pull_prints_the_path(headrace: Headrace, tiny: str) -> None:
    assert headrace("pull", tiny).out == f"{tiny}\n"
    answer = json.loads(headrace("pull", tiny, "--json").out)
    assert answer == {"model": tiny, "path": tiny, "size": Path(tiny).stat().st_size}


def test_synth_writes_a_model_that_runs(
    headrace: Headrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = headrace("synth", "qwen2-tiny", "q4_k_m")
    assert result.out == "qwen2-tiny-Q4_K_M.gguf\n"
    assert "writing qwen2-tiny-Q4_K_M.gguf: 100% of" in result.err
    first = (tmp_path / "qwen2-tiny-Q4_K_M.gguf").read_bytes()
    again = json.loads(headrace("synth", "qwen2-tiny", "-o", "again", "--json").out)
    assert again == {"path": "again", "size": len(first)}
    assert (tmp_path / "again").read_bytes() == first
    assert headrace("synth", "qwen2-tiny", "-o", "again", "-s", "1", "--force").code == 0
    assert (tmp_path / "again").read_bytes() != first
    assert json.loads(headrace("info", "again", "--json").out)["supported"]


def test_bench_measures_what_it_says(
    headrace: Headrace, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_READ_BYTES", 8 << 20)
    options = ("-p", "20,0", "-n", "4", "-d", "0,8", "-r", "3", "--device", "reference")
    facts = json.loads(headrace("bench", tiny, *options, "-t", "2", "--json").out)
    tests = {test["test"]: test for test in facts["tests"]}
    assert list(tests) == ["pp20", "tg4", "pp20 @ d8", "tg4 @ d8"]
    info = json.loads(headrace("info", tiny, "--json").out)
    weights, position = info["weight_bytes_per_token"], info["kv_bytes_per_position"]
    assert tests["tg4"]["n_bytes"] == 4 * weights + (1 + 2 + 3 + 4) * position
    assert tests["tg4 @ d8"]["n_bytes"] == 4 * weights + (9 + 10 + 11 + 12) * position
    assert tests["pp20"]["n_bytes"] == weights
    for test in facts["tests"]:
        rates = test["n_tokens"] / np.array(test["seconds"])
        assert test["tokens_per_second"] == pytest.approx(rates.mean())
        assert test["tokens_per_second_stddev"] == pytest.approx(rates.std(ddof=1))
        share = test["n_bytes"] / np.mean(test["seconds"]) / (facts["read_gb_per_second"] * 1e9)
        assert test["bandwidth_share"] == pytest.approx(share)

    lines = headrace("bench", tiny, *options).out.splitlines()
    assert lines[0].split("|")[6].strip() == "test"
    assert lines[2].split("|")[6].strip() == "pp20"
    assert re.fullmatch(r"read bandwidth: [\d.]+ GB/s with \d+ threads", lines[-1])


def test_ppl_is_the_mean_over_the_second_halves(
    headrace: Headrace, tiny: str, tmp_path: Path
) -> None:
    text = "the miller looked at the water before it arrived " * 6
    (tmp_path / "text").write_text(text)
    options = ("-f", str(tmp_path / "text"), "-c", "64", "--device", "reference")
    facts = json.loads(headrace("ppl", tiny, *options, "--json").out)
    losses = []
    with library.load(tiny, "reference") as model:
        tokens = model.tokenize(text, bos=True)
        assert model.tokenizer.add_bos
        assert len(tokens) >= 128
        for start in range(0, len(tokens) - 63, 64):
            chunk = [tokens[0], *tokens[start + 1 : start + 64]]
            logits = model.logits(chunk).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            losses += [-logprobs[i, chunk[i + 1]] for i in range(32, 63)]
    assert facts["counted_tokens"] == len(losses)
    assert facts["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    error = np.exp(np.mean(losses)) * np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert facts["standard_error"] == pytest.approx(error, rel=1e-4)
    assert headrace("ppl", tiny, *options).out.startswith(f"perplexity {facts['perplexity']:.4f}")


def test_ppl_has_a_text_of_its_own(headrace: Headrace, tiny: str) -> None:
    facts = json.loads(headrace("ppl", tiny, "-c", "1024", "--device", "reference", "--json").out)
    assert facts["text"] == "built-in"
    assert facts["chunks"] >= 1


def test_the_read_bandwidth_reads_every_byte_asked_for() -> None:
    checksum = bench._checksum()
    values = np.random.default_rng(0).integers(0, 2**63, 10_001, dtype=np.uint64)
    assert checksum(values) == np.bitwise_xor.reduce(values)
