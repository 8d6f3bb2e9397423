"""What the fixtures ``headrace`` and ``start`` give."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Headrace = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]
