"""How far a device's answers are from exact arithmetic, beside llama.cpp's own distance.

    python bench/accuracy.py smollm2 gemma3:270m --device cpu

Teacher-forces the golden cases and the perplexity text of tests/data/golden on the device and on
the float32 reference. With ``--products`` a GPU goes another way than it does by default: int8
(``dots``), bfloat16 on tensor cores (``tensor``), for prompts alone (``prompts``), or float32
(``floats``). ``--device reference --cache-type q8_0`` is what
rounding the cache alone costs. Exit code 1 if a limit is not met, 2 if a model cannot be measured.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from headrace import hub
from headrace.backend import CACHED_BYTES
from headrace.devices import load_runner
from headrace.errors import DeviceError, HeadraceError, ModelError
from headrace.gguf.reader import open_gguf
from headrace.model import load_decoder
from headrace.model.decoder import Decoder
from headrace.reference.accuracy import Accuracy, Golden, measure, read_golden

GOLDEN_FOLDER = Path(__file__).parents[1] / "tests" / "data" / "golden"


def golden_of(path: Path) -> Golden:
    """The golden data recorded for exactly this file. Raises ModelError if there is none."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    known = [read_golden(one) for one in sorted(GOLDEN_FOLDER.glob("*.json"))]
    for golden in known:
        if golden.sha256 == sha256:
            return golden
    names = ", ".join(golden.model for golden in known)
    raise ModelError(f"{path}: no golden data for this file; there is some for {names}")


PRODUCTS: dict[str, dict[str, Any]] = {
    "dots": {},
    "tensor": {"tensor_rows": 1},
    "prompts": {"prompt_rows": 1024},
    "few": {"few_rows": range(2, 17), "max_rows": 16},
    "floats": {"float_activations": True},
}
"""Options of the CUDA backend."""


def load_other(
    decoder: Decoder, device: str, threads: int | None, products: str | None, cache_type: str
) -> tuple[Any, str]:
    """The runner to measure, and its name."""
    if products is None:
        runner: Any = load_runner(decoder, device, threads=threads, cache_type=cache_type)
        return runner, runner.device_name
    if device != "cuda":
        raise DeviceError(f"--products is about --device cuda, not {device}")
    from headrace.cuda.runner import CUDARunner

    runner = CUDARunner(decoder, cache_type=cache_type, **PRODUCTS[products])
    return runner, f"{runner.device_name}, {products}"


def measure_file(
    path: Path, device: str, threads: int | None, products: str | None, cache_type: str
) -> dict[str, Any]:
    """Measure one model file; the result is ready for JSON."""
    golden = golden_of(path)
    decoder = load_decoder(open_gguf(path))
    reference = load_runner(decoder, "reference")
    other, device_name = load_other(decoder, device, threads, products, cache_type)
    try:
        accuracy = measure(reference, other, golden)
    finally:
        reference.close()
        other.close()
    return {
        "model": golden.model,
        "device": device_name,
        "cache_type": cache_type,
        **figures(accuracy),
        "disagreements": [round(gap, 4) for gap in disagreements(accuracy)],
        "llama_cpp": golden.llama_cpp,
        "failures": accuracy.failures(golden.llama_cpp),
    }


def figures(accuracy: Accuracy) -> dict[str, float]:
    """Under llama.cpp's names in the golden files, and what they lack."""
    return {
        "kl_cases_mean": float(accuracy.cases.kl.mean()),
        "kl_cases_max": float(accuracy.cases.kl.max()),
        "top1_cases": accuracy.cases.top1,
        "kl_perplexity_text_mean": float(accuracy.text.kl.mean()),
        "top1_perplexity_text": accuracy.text.top1,
        "perplexity": accuracy.device_perplexity,
        "reference_perplexity": accuracy.reference_perplexity,
        "perplexity_ratio": accuracy.perplexity_ratio,
    }


def disagreements(accuracy: Accuracy) -> list[float]:
    """The reference logprob lost at each disagreement on the first choice, largest first."""
    gaps = [*accuracy.cases.gap.tolist(), *accuracy.text.gap.tolist()]
    return sorted((gap for gap in gaps if gap > 0), reverse=True)


def table(result: dict[str, Any]) -> str:
    """One model's figures beside llama.cpp's, as text."""
    rows = [
        ("mean KL, 48-token continuations", "kl_cases_mean", ".5f"),
        ("max KL", "kl_cases_max", ".4f"),
        ("mean KL, perplexity text", "kl_perplexity_text_mean", ".5f"),
        ("top-1, continuations", "top1_cases", ".2%"),
        ("top-1, perplexity text", "top1_perplexity_text", ".2%"),
        ("perplexity", "perplexity", ".4f"),
        ("perplexity / reference's", "perplexity_ratio", ".5f"),
    ]
    kept = "" if result["cache_type"] == "f16" else f", cache {result['cache_type']}"
    lines = [
        f"{result['model']} on {result['device']}{kept}, against the float32 reference",
        f"  {'':34}{'headrace':>12}{'llama.cpp':>12}",
    ]
    for label, key, form in rows:
        ours, theirs = format(result[key], form), format(result["llama_cpp"][key], form)
        lines.append(f"  {label:34}{ours:>12}{theirs:>12}")
    gaps = result["disagreements"]
    lines.append(f"  {len(gaps)} first choices differ; largest gaps: {gaps[:10]}")
    lines += [f"  FAILED: {failure}" for failure in result["failures"]] or ["  all limits met"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a known name or a path")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "reference"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--products", nargs="+", choices=list(PRODUCTS), default=[None])
    parser.add_argument("--cache-type", nargs="+", choices=CACHED_BYTES, default=["f16"])
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    arguments = parser.parse_args()
    results = []
    for model in arguments.models:
        try:
            path = Path(hub.resolve(model))
            for products, cache_type in itertools.product(arguments.products, arguments.cache_type):
                results.append(
                    measure_file(path, arguments.device, arguments.threads, products, cache_type)
                )
                if not arguments.json:
                    print(table(results[-1]), flush=True)
        except HeadraceError as error:
            print(f"error: {model}: {error}", file=sys.stderr)
            return 2
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 1 if any(result["failures"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
