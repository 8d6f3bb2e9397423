"""``org/repo:QUANT``: GGUF files from the Hugging Face hub (extra ``hub``).

Files stay in huggingface-hub's own cache, shared with other programs. headrace remembers which
files a name meant, so that a model once fetched starts without the network.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from headrace.errors import HubError
from headrace.hub.cache import Notice, cache_dir

_QUANT = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d+(?:_[0-9A-Z]+)*|BF16|FP?16|FP?32|MXFP4))(?=[-._/]|$)",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")


def fetch(repo: str, quant: str | None, notice: Notice, *, refresh: bool = False) -> Path:
    """The GGUF of ``repo`` in ``quant``; of a split model the first file. Raises HubError."""
    name = f"{repo}:{quant}" if quant else repo
    if not refresh and (files := _recall(name)):
        return files[0]
    hub = _library()
    try:
        listed = hub.HfApi().list_repo_files(repo)
    except Exception as error:
        raise HubError(_refusal(repo, error)) from error
    chosen = choose(repo, listed, quant)
    notice(f"fetching {', '.join(chosen)} from {repo}; its licence is on its page at hf.co/{repo}")
    try:
        files = [Path(hub.hf_hub_download(repo, filename)) for filename in chosen]
    except Exception as error:
        raise HubError(_refusal(repo, error)) from error
    _remember(name, files)
    return files[0]


def choose(repo: str, listed: Iterable[str], quant: str | None) -> list[str]:
    """The files among ``listed`` that ``quant`` (or a file's own name) means, splits in order.

    Raises HubError that lists what exists when that is none, several, or an incomplete set.
    """
    models: dict[str, list[str]] = {}
    for filename in sorted(listed):
        stem = filename.removesuffix(".gguf")
        if stem != filename and "mmproj" not in filename.lower():
            models.setdefault(_SPLIT.sub("", stem), []).append(filename)
    if not models:
        raise HubError(f"{repo} has no .gguf files: look for a repository with GGUF in its name")
    if quant is None:
        matching = list(models)
    else:
        wanted = quant.removesuffix(".gguf").lower()
        matching = [m for m in models if wanted in (m.lower(), m.rpartition("/")[2].lower())]
        matching = matching or [m for m in models if quant_label(m).lower() == wanted]
    if len(matching) != 1:
        problem = f"has no {quant}" if not matching else "has several models that fit"
        choices = sorted(quant_label(m) or m for m in matching or models)
        if len(set(choices)) < len(choices):  # the labels do not tell them apart
            choices = sorted(f"{m}.gguf" for m in matching or models)
        raise HubError(f"{repo} {problem}: choose one as {repo}:NAME of {', '.join(choices)}")
    files = models[matching[0]]
    split = _SPLIT.search(files[0].removesuffix(".gguf"))
    if split and len(files) != int(split[2]):
        raise HubError(f"{repo}: {len(files)} of the {split[2]} files of {matching[0]} are there")
    return files


def quant_label(filename: str) -> str:
    """The quantisation in a file's name, as written there: ``Q4_K_M``; empty when there is none."""
    labels = _QUANT.findall(_SPLIT.sub("", filename.removesuffix(".gguf")))
    return labels[-1] if labels else ""


def remembered() -> Iterator[tuple[str, list[Path]]]:
    """(name, files) of every hub model fetched before and still there."""
    for record in sorted(_records().glob("*.json")):
        if read := _read(record):
            yield read


def _library() -> Any:
    library: Any
    try:
        import huggingface_hub as library
    except ImportError as error:
        raise HubError(
            "models from the Hugging Face hub need huggingface-hub: pip install 'headrace[hub]'"
        ) from error
    if not sys.stderr.isatty():
        import_module("huggingface_hub.utils").disable_progress_bars()
    return library


def _refusal(repo: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{repo} is gated: accept its terms at hf.co/{repo}, then 'hf auth login'"
    if kind == "RepositoryNotFoundError":
        return f"{repo} is not on the Hugging Face hub, or is private ('hf auth login' if it is)"
    if kind == "OfflineModeIsEnabled":
        return f"{repo} has not been fetched before, and HF_HUB_OFFLINE is set"
    cause = (str(error).strip().splitlines() or [kind])[0]
    return f"could not fetch {repo}: {cause}. Check the network and run the same command again"


def _records() -> Path:
    return cache_dir() / "hub"


def _record(name: str) -> Path:
    return _records() / (re.sub("[/:]", "--", name) + ".json")


def _recall(name: str) -> list[Path]:
    read = _read(_record(name))
    return read[1] if read and read[0] == name else []


def _read(record: Path) -> tuple[str, list[Path]] | None:
    """(name, files) of a record; None when it is missing or damaged, or a file has gone."""
    try:
        content = json.loads(record.read_text())
        name, files = str(content["name"]), [Path(file) for file in content["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (name, files) if files and all(file.is_file() for file in files) else None


def _remember(name: str, files: list[Path]) -> None:
    record = _record(name)
    partial = record.with_suffix(f".{os.getpid()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"name": name, "files": [str(file) for file in files]}))
        partial.replace(record)
    except OSError as error:
        raise HubError(
            f"cannot write {record}: {error}; set HEADRACE_CACHE to a folder that can be written"
        ) from error
