"""Writes the measured figures into README.md, from what the measuring programs printed.

    make figures

runs them all, then this. What has not been measured is left out, so the README holds no figure
without its file in bench/results.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    sections = {"speed": speed, "gpu": gpu, "accuracy": accuracy}
    text = SECTION.sub(
        lambda found: f"{found[1]}{sections[found[2]]()}{found[3]}", readme.read_text()
    )
    readme.write_text(text)


def speed() -> str:
    return "".join((compared(), alone(), waiting()))


def compared() -> str:
    reports = lines("compare.json")
    if not reports:
        return ""
    rows = [("model", "test", "headrace, tok/s", "llama.cpp, tok/s", "ratio")]
    for report in reports:
        for key, test in report["tests"].items():
            rates = test["tokens_per_second"].values()
            ours, theirs = (statistics.median(repetitions) for repetitions in rates)
            name = key.replace("_", " ")
            rows.append((label(report["file"]), name, f"{ours:.0f}", f"{theirs:.0f}",
                         f"**{test['ratio']:.2f}**"))  # fmt: skip
    files = " ".join(sorted({argument(report["file"]) for report in reports}))
    return (
        f"Both engines on the same file, in turn, in one run, {reports[0]['threads']} threads of "
        f"{reports[0]['machine']}:\n`python bench/vs_llama_cpp.py {files}`\n\n{table(rows)}\n"
    )


def alone() -> str:
    rows = [("model", "test", "tok/s", "GB/s", "share of the read bandwidth", "command")]
    for path in sorted(RESULTS.glob("bench-*.json")):
        facts = json.loads(path.read_text())
        command = f"`headrace bench {argument(facts['path'])}`"
        rows += [
            (label(facts["path"]), test["test"],
             f"{test['tokens_per_second']:.0f} ± {test['tokens_per_second_stddev']:.0f}",
             f"{test['gb_per_second']:.1f}", f"{test['bandwidth_share']:.0%}", command)
            for test in facts["tests"]
        ]  # fmt: skip
    if len(rows) == 1:
        return ""
    return f"Alone, beside what plain reading of memory reached in that run:\n\n{table(rows)}\n"


def waiting() -> str:
    text = ""
    for facts in lines("first-token.json"):
        text += (
            f"The first token of `headrace run {facts['model']}` comes "
            f"{statistics.median(facts['seconds']):.2f} s after the process starts, "
            f"{facts['first_run_seconds']:.0f} s the very first time, when kernels are compiled; "
            f"peak resident memory is {facts['peak_resident_bytes'] / 1e6:.0f} MB, of which "
            f"{facts['size'] / 1e6:.0f} MB are the file:\n"
            f"`python bench/first_token.py {facts['model']}`\n"
        )
    return text


def accuracy() -> str:
    path = RESULTS / "accuracy.json"
    if not path.exists():
        return ""
    rows = [("model", "", "headrace", "llama.cpp")]
    for result in json.loads(path.read_text()):
        theirs = result["llama_cpp"]
        for name, key, form in (
            ("mean KL divergence, continuations", "kl_cases_mean", ".4f"),
            ("mean KL divergence, text", "kl_perplexity_text_mean", ".4f"),
            ("same first choice, continuations", "top1_cases", ".1%"),
            ("same first choice, text", "top1_perplexity_text", ".1%"),
            ("perplexity / float32's", "perplexity_ratio", ".4f"),
        ):
            rows.append((result["model"], name, format(result[key], form),
                         format(theirs[key], form)))  # fmt: skip
    return (
        "Against exact float32 arithmetic on the same dequantised weights: "
        f"`python bench/accuracy.py smollm2 gemma3:270m`\n\n{table(rows)}\n"
    )


def gpu() -> str:
    """Of each receipt ``bench/results/<device>/decode-*.json``: what bench/gpu.py measured."""
    text = ""
    for path in sorted(RESULTS.glob("*/decode-*.json")):
        receipt = json.loads(path.read_text())
        rows = [("model", "work", "tok/s", "share of the read ceiling")]
        for model in receipt["models"]:
            if model["products"] != "default":
                continue
            rows += [
                (f"{model['model']} {model['recipe']}", f"decode at depth {one['depth']:,}",
                 f"{one['tok_per_s']:.0f}", f"{one['share_of_ceiling']:.0%}")
                for one in model["decode"] if one["sampling"] == "greedy"
            ]  # fmt: skip
            rows += [
                ("", f"{one['rows']} sequences", f"{one['tok_per_s']:.0f} in all", "")
                for one in model["rows"]
                if one["rows"] in (8, 32)
            ]
            rows += [
                ("", f"prompt of {one['tokens']}", f"{one['tok_per_s']:.0f}", "")
                for one in model["prefill"]
            ]
        command = re.sub(r" --(commit|json) \S+", "", receipt["command"])
        ceiling = receipt["read_ceiling"]["gb_per_s"]
        text += (
            f"One {receipt['device']}, driver {receipt['driver']}, which reads {ceiling:,.0f} GB/s "
            f"in the same run; random weights: `{command}` (commit {receipt['commit'][:7]})\n\n"
            f"{table(rows)}\n"
        )
    return text


def label(path: str) -> str:
    return Path(path).stem


def argument(path: str) -> str:
    """How a reader would name that file."""
    return "smollm2" if "SmolLM2" in path else Path(path).name


def lines(name: str) -> list[Any]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers after the first two columns stand to the right."""
    rule = ["---" if i < 2 or name == "command" else "---:" for i, name in enumerate(rows[0])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


if __name__ == "__main__":
    main()
