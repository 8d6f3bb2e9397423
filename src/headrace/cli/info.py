"""``headrace info``: what a file holds and what running it takes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import console
from headrace.cli.options import CacheType, Context, Json, ModelName

if TYPE_CHECKING:
    from headrace.gguf import GGUFFile


_PlanFor = Annotated[
    str | None,
    typer.Option("--device", help="cuda: also the plan of this GPU's memory.", show_default="none"),
]


def info(
    model: ModelName,
    context: Context = None,
    device: _PlanFor = None,
    cache_type: CacheType = "f16",
    as_json: Json = False,
) -> None:
    """Show a model's architecture, tensors by type, bytes a token and the memory it needs."""
    from headrace.devices import check_cache_type
    from headrace.gguf import open_gguf

    check_cache_type(cache_type, device or "cuda")  # for whatever device the memory is counted
    path = console.resolve(model)
    with open_gguf(path) as file:
        facts = collect(path, file, context, cache_type)
        if device is not None:
            facts["device_memory"] = _device_memory(file, device, context, cache_type)
    print(json.dumps(facts, indent=2) if as_json else _as_text(facts))


def collect(
    path: Path, file: GGUFFile, context: int | None = None, cache_type: str = "f16"
) -> dict[str, Any]:
    """All that ``info`` shows, as JSON. Sizes are in bytes."""
    from headrace.errors import HeadraceError, RequestError
    from headrace.model import load_decoder

    metadata = file.metadata
    n_parameters = sum(_n_weights(t.shape) for t in file.tensors.values())
    facts: dict[str, Any] = {
        "path": str(path),
        "name": metadata.get("general.name"),
        "architecture": metadata.get("general.architecture"),
        "licence": metadata.get("general.license"),
        "size": file.n_bytes,
        "parameters": n_parameters,
        "bits_per_weight": 8 * sum(t.n_bytes for t in file.tensors.values()) / n_parameters,
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in metadata,
        "tensors": _tensors_by_type(file),
    }
    try:
        decoder = load_decoder(file)
    except HeadraceError as error:
        return facts | {"supported": False, "unsupported_because": str(error)}
    from headrace.bench import kv_bytes_per_position, weight_bytes_per_step
    from headrace.engine.engine import DEFAULT_CONTEXT

    per_position = kv_bytes_per_position(decoder, cache_type)
    longest = decoder.config.context_length
    if context is not None and context > longest:
        raise RequestError(f"context must be a whole number from 1 to {longest}, not {context}")
    lengths = {context or longest, min(DEFAULT_CONTEXT, longest), longest}
    return facts | {
        "supported": True,
        "config": asdict(decoder.config),
        "weight_bytes_per_token": weight_bytes_per_step(decoder),
        "kv_bytes_per_position": per_position,
        "memory": [
            {"context": n, "kv_cache": n * per_position, "total": file.n_bytes + n * per_position}
            for n in sorted(lengths)
        ],
    }


def _device_memory(
    file: GGUFFile, device: str, context: int | None, cache_type: str
) -> dict[str, Any]:
    """What the model takes on a GPU at ``context`` positions, part by part."""
    from headrace.devices import memory_plan
    from headrace.engine.engine import choose_context
    from headrace.model import load_decoder

    decoder = load_decoder(file)
    context = choose_context(context, decoder.config.context_length)
    parts = memory_plan(decoder, device, context, cache_type)
    return {
        "device": device,
        "context": context,
        "parts": [{"what": what, "bytes": n_bytes} for what, n_bytes in parts],
        "total": sum(n_bytes for _, n_bytes in parts),
    }


def _n_weights(shape: tuple[int, ...]) -> int:
    n = 1
    for dimension in shape:
        n *= dimension
    return n


def _tensors_by_type(file: GGUFFile) -> list[dict[str, Any]]:
    tensors, weights, sizes = Counter[str](), Counter[str](), Counter[str]()
    for tensor in file.tensors.values():
        kind = tensor.qtype.name
        tensors[kind] += 1
        weights[kind] += _n_weights(tensor.shape)
        sizes[kind] += tensor.n_bytes
    return [
        {"type": kind, "tensors": tensors[kind], "weights": weights[kind], "bytes": n_bytes}
        for kind, n_bytes in sizes.most_common()
    ]


def _as_text(facts: dict[str, Any]) -> str:
    tokenizer = " / ".join(filter(None, (facts["tokenizer"], facts["pre_tokenizer"])))
    bits = facts["bits_per_weight"]
    rows = [
        ("file", facts["path"]),
        ("name", str(facts["name"] or "unnamed")),
        ("architecture", str(facts["architecture"])),
        ("licence", str(facts["licence"] or "not stated in the file")),
        ("size", f"{console.size(facts['size'])}, {bits:.2f} bits a weight"),
        ("parameters", console.count(facts["parameters"])),
    ]
    if config := facts.get("config"):
        heads = f"{config['n_heads']} query, {config['n_kv_heads']} key-value, "
        rows += [
            ("layers", str(config["n_layers"])),
            ("width", f"{config['d_model']:,}; feed-forward {config['d_ff']:,}"),
            ("heads", f"{heads}{config['head_dim']} wide"),
            ("context", f"{config['context_length']:,}"),
            ("vocabulary", f"{config['n_vocab']:,}"),
        ]
    rows += [
        ("tokeniser", tokenizer or "none"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
    ]
    sections = [console.columns(rows), "Tensors by type\n" + _tensor_table(facts)]
    if facts["supported"]:
        sections.append(_memory_text(facts))
    else:
        sections.append(f"headrace cannot run it: {facts['unsupported_because']}")
    if plan := facts.get("device_memory"):
        sections.append(_plan_text(plan))
    return "\n\n".join(sections)


def _tensor_table(facts: dict[str, Any]) -> str:
    total = sum(row["bytes"] for row in facts["tensors"])
    table = [("type", "tensors", "weights", "bytes", "share")]
    for row in facts["tensors"]:
        weights, n_bytes = console.count(row["weights"]), console.size(row["bytes"])
        share = f"{row['bytes'] / total:.1%}"
        table.append((row["type"], f"{row['tensors']:,}", weights, n_bytes, share))
    return console.columns(table, right=(1, 2, 3, 4), indent="  ")


def _memory_text(facts: dict[str, Any]) -> str:
    weights = console.size(facts["weight_bytes_per_token"])
    position = console.size(facts["kv_bytes_per_position"])
    table = [("context", "KV cache", "with the weights")]
    for row in facts["memory"]:
        kv, total = console.size(row["kv_cache"]), console.size(row["total"])
        table.append((f"{row['context']:,}", kv, total))
    return (
        f"A decoded token reads {weights} of weights, and {position} for each position before it.\n"
        "\nMemory at a context length\n" + console.columns(table, right=(0, 1, 2), indent="  ")
    )


def _plan_text(plan: dict[str, Any]) -> str:
    rows = [(part["what"], console.size(part["bytes"])) for part in plan["parts"]]
    rows.append(("in all", console.size(plan["total"])))
    head = f"Memory on {plan['device']} at a context of {plan['context']:,}\n"
    return head + console.columns(rows, right=(1,), indent="  ")
