"""``headrace models``: what has a name, and what is already here."""

from __future__ import annotations

import json

from headrace import hub
from headrace.cli import console
from headrace.cli.options import Json


def models(as_json: Json = False) -> None:
    """List the models known by name and those in the cache, with sizes and licences."""
    cached = {model.name: model for model in hub.cached_models()}
    rows: list[dict[str, object]] = [
        {
            "name": model.name,
            "aliases": list(model.aliases),
            "description": model.description,
            "size": model.size,
            "licence": model.licence,
            "terms": model.terms,
            "path": str(cached[model.name].path) if model.name in cached else None,
        }
        for model in hub.known_models()
    ]
    known = {row["name"] for row in rows}
    rows += [
        {
            "name": model.name,
            "aliases": [],
            "description": "from the Hugging Face hub",
            "size": model.size,
            "licence": model.licence,
            "terms": f"https://hf.co/{model.name.partition(':')[0]}",
            "path": str(model.path),
        }
        for model in cached.values()
        if model.name not in known
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = [("NAME", "SIZE", "CACHED", "LICENCE", "WHAT IT IS")]
    for row in rows:
        size = console.size(row["size"]) if isinstance(row["size"], int) else ""
        here = "yes" if row["path"] else "no"
        licence = str(row["licence"] or "see its page")
        table.append((str(row["name"]), size, here, licence, str(row["description"])))
    print(console.columns(table, right=(1,)))
    print(f"\nCached in {hub.cache_dir() / 'models'}")
    print("Also: the path of any .gguf file, or org/repo:QUANT from the Hugging Face hub.")
