"""``headrace bench``: prefill and decode speed beside the machine's read bandwidth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import headrace
from headrace.cli import console
from headrace.cli.options import CacheType, Device, Json, ModelName, Threads
from headrace.errors import RequestError

_Prompts = Annotated[
    str, typer.Option("-p", "--n-prompt", help="Prompt lengths, comma-separated; 0: none.")
]
_Generate = Annotated[
    str, typer.Option("-n", "--n-gen", help="Tokens to decode, comma-separated; 0: none.")
]
_Depths = Annotated[
    str, typer.Option("-d", "--n-depth", help="Positions cached before, comma-separated.")
]
_Repetitions = Annotated[
    int, typer.Option("-r", "--repetitions", min=1, help="Repetitions of each test.")
]


def bench(
    model: ModelName,
    prompts: _Prompts = "128,512",
    generate: _Generate = "64",
    depths: _Depths = "0",
    repetitions: _Repetitions = 5,
    threads: Threads = None,
    device: Device = "auto",
    cache_type: CacheType = "f16",
    as_json: Json = False,
) -> None:
    """Measure prefill (pp) and decode (tg) tok/s, GB/s and the share of the read bandwidth.

    The table is llama-bench's, with two columns more: the bytes a second that the test has to read
    at least, and their share of what a plain read of memory reaches in the same run.
    """
    lengths = [n for n in _numbers("-p", prompts) if n], [n for n in _numbers("-n", generate) if n]
    if not any(lengths):
        raise RequestError("nothing to measure: give -p or -n a length above 0")
    from headrace.devices import check_cache_type, choose_device

    device = choose_device(device, threads)
    check_cache_type(cache_type, device)
    path = console.resolve(model)
    facts = _measure(
        model, str(path), *lengths, _numbers("-d", depths), repetitions, threads, device, cache_type
    )
    print(json.dumps(facts, indent=2) if as_json else _as_table(facts))


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise RequestError(f"{option} takes whole numbers separated by commas, not {text!r}")
    return numbers


def _measure(
    model: str,
    path: str,
    prompts: list[int],
    generate: list[int],
    depths: list[int],
    repetitions: int,
    threads: int | None,
    device: str,
    cache_type: str,
) -> dict[str, Any]:
    from headrace import bench as measuring
    from headrace.devices import load_runner
    from headrace.gguf import open_gguf
    from headrace.model import load_decoder

    with console.Status() as status, open_gguf(path) as file:
        status("loading (the first run compiles kernels)")
        decoder = load_decoder(file)
        runner = load_runner(decoder, device, threads=threads, cache_type=cache_type)
        timer = measuring.StepTimer(runner, max(depths) + max([*prompts, *generate]))
        ceiling = measuring.ReadBandwidth(runner, threads)
        status("measuring the read bandwidth")
        ceiling.measure()
        status("measuring the model")
        results = measuring.measure(timer, prompts, generate, depths, repetitions, cache_type)
        status("measuring the read bandwidth")
        ceiling.measure()
        work = measuring.decode_work(timer)
        runner.close()
        n_parameters = sum(tensor.n_rows * tensor.k for tensor in decoder.weights.values())
        return {
            "version": headrace.__version__,
            "model": model,
            "path": path,
            "architecture": decoder.config.architecture,
            "size": file.n_bytes,
            "parameters": n_parameters,
            "device": runner.device_name,
            "threads": ceiling.threads,
            "cache_type": cache_type,
            "read_gb_per_second": ceiling.best / 1e9,
            **({} if work is None else {"decode_work_per_token": work}),
            "tests": [result.as_json(ceiling.best) for result in results],
        }


def _as_table(facts: dict[str, Any]) -> str:
    rows = [("model", "size", "params", "backend", "threads", "test", "t/s", "GB/s", "of read")]
    for test in facts["tests"]:
        speed = f"{test['tokens_per_second']:.2f} ± {test['tokens_per_second_stddev']:.2f}"
        rows.append(
            (
                Path(facts["model"]).name,
                console.size(facts["size"]),
                console.count(facts["parameters"]),
                facts["device"],
                str(facts["threads"] or "-"),
                test["test"],
                speed,
                f"{test['gb_per_second']:.1f}",
                f"{test['bandwidth_share']:.0%}",
            )
        )
    bandwidth = f"{facts['read_gb_per_second']:,.1f} GB/s"
    if facts["threads"] is not None:
        bandwidth += f" with {facts['threads']} threads"
    if work := facts.get("decode_work_per_token"):
        bandwidth += (
            f"\na decoded token: {work['graph_launches']:g} graph launches, "
            f"{work['kernel_launches']:g} kernel launches, "
            f"{work['synchronisations']:g} blocking synchronisations"
        )
    return f"{_markdown(rows, right=(1, 2, 4, 5, 6, 7, 8))}\n\nread bandwidth: {bandwidth}"


def _markdown(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """A Markdown table that is aligned as plain text too; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * (width + 1) + (":" if i in right else "-") for i, width in enumerate(widths)]
    lines = [
        [
            f" {cell.rjust(width) if i in right else cell.ljust(width)} "
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join(f"|{'|'.join(line)}|" for line in (lines[0], rule, *lines[1:]))
