"""headrace and llama.cpp on the same files, in turn, in one run.

    pip install -e '.[peers]'
    python bench/vs_llama_cpp.py smollm2 llama-1b-Q4_K_M.gguf

Each engine lives in a child process of its own with the model loaded; the parent asks them for one
measurement at a time, A B B A A B …, so that whatever else the machine does meets both. Neither
samples: both take the greedy argmax of the last row of logits, in decode. llama.cpp runs at its
best: its C API called directly (one ctypes call a step), flash attention left to choose, weights
repacked, 512-token batches, logits of the last token only, the same number of threads.

The ratios are headrace's median tok/s over llama.cpp's. With ``--json``, one object a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

BATCH = 512


class Engine(Protocol):
    def prefill(self, n_tokens: int) -> float: ...
    def decode(self, n_tokens: int, depth: int) -> float: ...


class Headrace:
    """``seconds = prefill(n)`` and ``decode(n, depth)`` of headrace's CPU backend."""

    name = "headrace"

    def __init__(self, path: str, threads: int, context: int) -> None:
        import headrace
        from headrace.bench import StepTimer
        from headrace.devices import load_runner
        from headrace.gguf import open_gguf
        from headrace.model import load_decoder

        self.version = headrace.__version__
        self._timer = StepTimer(
            load_runner(load_decoder(open_gguf(path)), "cpu", threads=threads), context
        )

    def prefill(self, n_tokens: int) -> float:
        return self._timer.prefill(n_tokens)

    def decode(self, n_tokens: int, depth: int) -> float:
        self._timer.fill(depth)
        return self._timer.decode(n_tokens, depth)


class LlamaCpp:
    """The same of llama.cpp, through the C functions that llama-cpp-python binds."""

    name = "llama.cpp"

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp
        import numpy as np

        self._np, self._api = np, llama_cpp
        self.version = f"{llama_cpp.__version__} ({llama_cpp.llama_print_system_info().decode()})"
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(0)

    def prefill(self, n_tokens: int) -> float:
        self._api.llama_memory_clear(self._memory, False)
        start = time.perf_counter()
        self._prompt(n_tokens)
        return time.perf_counter() - start

    def decode(self, n_tokens: int, depth: int) -> float:
        self._api.llama_memory_clear(self._memory, False)
        self._prompt(depth)
        token = int(self._random.integers(self._n_vocab))
        start = time.perf_counter()
        for _ in range(n_tokens):
            token = int(self._step([token]).argmax())
        return time.perf_counter() - start

    def _prompt(self, n_tokens: int) -> None:
        tokens = self._random.integers(self._n_vocab, size=n_tokens).tolist()
        for done in range(0, n_tokens, BATCH):
            self._step(tokens[done : done + BATCH])

    def _step(self, tokens: list[int]) -> Any:
        """Logits of the last token, float32 [n_vocab]."""
        ids = (self._api.llama_token * len(tokens))(*tokens)
        # llama_batch_get_one follows the positions by itself and wants the last logits only.
        status = self._api.llama_decode(
            self._context, self._api.llama_batch_get_one(ids, len(tokens))
        )
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        logits = self._api.llama_get_logits_ith(self._context, -1)  # waits until they are there
        return self._np.ctypeslib.as_array(logits, (self._n_vocab,))


ENGINES: dict[str, type[Headrace] | type[LlamaCpp]] = {"headrace": Headrace, "llama.cpp": LlamaCpp}


def serve(engine: str, path: str, threads: int, context: int) -> None:
    """A child: load, then answer one JSON line for each on stdin."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    loaded = ENGINES[engine](path, threads, context)
    print(json.dumps({"version": loaded.version}), file=answers)
    for line in sys.stdin:
        test = json.loads(line)
        seconds = (
            loaded.decode(test["n"], test["depth"])
            if test["kind"] == "decode"
            else loaded.prefill(test["n"])
        )
        print(json.dumps({"seconds": seconds}), file=answers)


class Child:
    """An engine in a process of its own."""

    def __init__(self, engine: str, python: str, path: str, threads: int, context: int) -> None:
        command = [python, __file__, "--serve", engine, "--threads", str(threads)]
        self._process = subprocess.Popen(
            [*command, "--context", str(context), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.engine = engine
        self.version = self._answer()["version"]

    def seconds(self, test: Test) -> float:
        question = {"kind": test.kind, "n": test.n_tokens, "depth": test.depth}
        _pipe(self._process.stdin).write(json.dumps(question) + "\n")
        _pipe(self._process.stdin).flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            sys.exit(f"{self.engine} ended with status {self._process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # both were asked for
    return pipe


@dataclass(frozen=True)
class Test:
    kind: str
    n_tokens: int
    depth: int

    @property
    def key(self) -> str:
        """The name of its ratio: ``prefill_512``, ``decode``, ``decode_at_4096``."""
        if self.kind == "prefill":
            return f"prefill_{self.n_tokens}"
        return "decode" if self.depth == SHORT_PROMPT else f"decode_at_{self.depth}"


SHORT_PROMPT = 16


def compare(path: str, tests: list[Test], arguments: argparse.Namespace) -> dict[str, Any]:
    """All tests of one file: raw tok/s of both engines and the ratios of their medians."""
    context = max(BATCH, max(test.depth + test.n_tokens for test in tests) + 1)
    pythons = {"headrace": sys.executable, "llama.cpp": arguments.llama_python or sys.executable}
    children = [
        Child(engine, python, path, arguments.threads, context)
        for engine, python in pythons.items()
    ]
    report: dict[str, Any] = {
        "file": path,
        "machine": machine(),
        "threads": arguments.threads,
        "versions": {child.engine: child.version for child in children},
        "tests": {},
    }
    for test in tests:
        rates: dict[str, list[float]] = {child.engine: [] for child in children}
        for repetition in range(arguments.repetitions + 1):
            for child in children if repetition % 2 else reversed(children):
                rate = test.n_tokens / child.seconds(test)
                if repetition:  # the first warms up
                    rates[child.engine].append(rate)
                time.sleep(arguments.pause)  # the threads of the one just measured go to sleep
        ours, theirs = (statistics.median(rates[child.engine]) for child in children)
        report["tests"][test.key] = {"tokens_per_second": rates, "ratio": ours / theirs}
        report[f"{test.key}_ratio"] = ours / theirs
        say(test, rates, ours / theirs)
    prefill = [report[f"{test.key}_ratio"] for test in tests if test.kind == "prefill"]
    if prefill:
        report["prefill_ratio"] = min(prefill)
    for child in children:
        child.close()
    return report


def machine() -> str:
    """The processor's name, as Linux gives it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} CPUs"


def say(test: Test, rates: dict[str, list[float]], ratio: float) -> None:
    figures = "   ".join(
        f"{engine} {statistics.median(r):8.1f} tok/s ({min(r):.1f} to {max(r):.1f})"
        for engine, r in rates.items()
    )
    print(f"  {test.key:<16} {figures}   ratio {ratio:.2f}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", help="paths or names headrace knows")
    parser.add_argument("--threads", "-t", type=int, default=2)
    parser.add_argument("--repetitions", "-r", type=int, default=7)
    parser.add_argument("--prompts", "-p", default="128,512", help="prefill lengths")
    parser.add_argument("--tokens", "-n", type=int, default=64, help="tokens to decode")
    parser.add_argument("--depths", "-d", default="", help="decode at these depths, too")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between measurements")
    parser.add_argument("--llama-python", help="the Python that has llama-cpp-python")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    parser.add_argument("--serve", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.models[0], arguments.threads, arguments.context)
        return

    from headrace import hub

    depths = [SHORT_PROMPT, *(int(depth) for depth in arguments.depths.split(",") if depth)]
    tests = [Test("decode", arguments.tokens, depth) for depth in depths]
    tests += [Test("prefill", int(n), 0) for n in arguments.prompts.split(",") if n]
    for name in arguments.models:
        path = str(hub.resolve(name))
        print(f"{name}, {arguments.threads} threads", file=sys.stderr, flush=True)
        report = compare(path, tests, arguments)
        if arguments.json:
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
