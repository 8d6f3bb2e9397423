"""A known model of two small parts, with the wheels it travels in, for the tests of the hub."""

from __future__ import annotations

import hashlib
import random
import zipfile
from pathlib import Path

from headrace.hub import KnownModel, Part, names

CONTENT = (random.Random(1).randbytes(70_000), random.Random(2).randbytes(50_000))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, number: int, content: bytes | None = None) -> Path:
    """The wheel of part ``number`` (1 or 2) in ``folder``."""
    package = f"headrace_tiny_part{number}"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{package}/tiny.part", content or CONTENT[number - 1])
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def known() -> KnownModel:
    parts = tuple(
        Part(
            requirement=f"headrace-tiny-part{number}==1.0",
            member=f"headrace_tiny_part{number}/tiny.part",
            size=len(content),
            sha256=_sha256(content),
            wheel_size=len(content),
        )
        for number, content in enumerate(CONTENT, 1)
    )
    whole = b"".join(CONTENT)
    return KnownModel(
        name="tiny",
        aliases=("tiny:1",),
        filename="tiny.gguf",
        description="two random parts",
        size=len(whole),
        sha256=_sha256(whole),
        licence="Tiny Terms",
        terms="https://example.org/tiny",
        parts=parts,
    )


def install() -> None:
    """Make ``tiny`` a known model of this process."""
    names.KNOWN_MODELS = (known(),)
