"""``headrace pull``: bring a model here, or check the copy that is here."""

from __future__ import annotations

import json

from headrace.cli import console
from headrace.cli.options import Json, ModelName


def pull(model: ModelName, as_json: Json = False) -> None:
    """Fetch a model into the cache, or verify in full the one that is there."""
    path = console.resolve(model, refresh=True)
    if as_json:
        print(json.dumps({"model": model, "path": str(path), "size": path.stat().st_size}))
    else:
        print(path)
