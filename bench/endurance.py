"""A long answer, twice, and many cancelled ones between: memory and greedy text must stay.

    python bench/endurance.py smollm2 --tokens 2000
    python bench/endurance.py llama-8b.gguf --device cuda

Exit code 1 if a text differs or memory grows. Memory is the GPU's that is free, or this process's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import headrace

PROMPT = [5, 6, 7]


def used(model: headrace.Model) -> int:
    """Bytes in use: of the GPU, or by this process."""
    if model.device == "cuda":
        device = model.engine.runner.executor.device  # type: ignore[attr-defined]
        return -int(device.free_bytes())
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def answer(model: headrace.Model, tokens: int) -> tuple[list[int], float]:
    """A greedy answer's ids, and the tokens a second it took."""
    start = time.perf_counter()
    done = model.generate(PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    return done.tokens, tokens / (time.perf_counter() - start)


def cancel(model: headrace.Model, count: int) -> None:
    """Answers that are left after one to seven pieces of text."""
    for i in range(count):
        prompt = [3, 4, i % 500]
        with model.stream(prompt, max_tokens=40, temperature=1, seed=i, ignore_eos=True) as stream:
            for _, _piece in zip(range(1 + i % 7), stream, strict=False):
                pass


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--cancelled", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    context = options.tokens + 64
    with headrace.load(options.model, options.device, context=context) as model:
        first, _ = answer(model, options.tokens)
        cancel(model, 16)  # everything is compiled and allocated now
        before = used(model)
        cancel(model, options.cancelled)
        second, rate = answer(model, options.tokens)
        facts = {
            "tokens": options.tokens,
            "tokens_per_second": rate,
            "cancelled": options.cancelled,
            "same_text": first == second,
            "bytes_grown": used(model) - before,
            "pages_held": model.engine.pool.n_held,
        }
    if options.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:18} {value}" for name, value in facts.items()))
    allowed = 0 if model.device == "cuda" else 8 << 20  # Python's own objects
    return int(not facts["same_text"] or facts["bytes_grown"] > allowed)


if __name__ == "__main__":
    sys.exit(main())
