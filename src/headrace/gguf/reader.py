"""Open a GGUF file: checked structure, typed metadata, tensors as zero-copy mapped views."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import weakref
from collections.abc import Mapping
from mmap import ACCESS_READ, MADV_DONTNEED, PAGESIZE, mmap
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.errors import GGUFError
from headrace.gguf.header import Header, TensorInfo, read_header
from headrace.gguf.types import Tensor

T = TypeVar("T")
D = TypeVar("D")

_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def open_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file, or all parts of a split one (given any of them), and check its structure.

    Raises GGUFError, naming the key or tensor and the byte offset, for anything malformed.
    """
    path = Path(path)
    part = _Part(path)
    count = part.split_key("split.count", default=1)
    if count <= 1:
        return GGUFFile(path, [part])
    return GGUFFile(path, _open_split(part, count))


class GGUFFile:
    """An open GGUF file. A context manager; tensors keep the mapping alive after :meth:`close`.

    ``metadata``: Python scalars, ``str``, ``list[str]``, or read-only NumPy arrays.
    ``tensors``: :class:`~headrace.gguf.types.Tensor` by name, in the file's order.
    A split file has the metadata of its first part and the tensors of all.

    A mapping cannot survive the file being truncated by someone else: touching a page that is gone
    kills the process (SIGBUS). ``tensors`` and :meth:`check_unchanged` compare the size first (one
    ``fstat``, about a microsecond), so that a step or request that starts after the truncation
    fails with GGUFError; only a truncation within the step itself is out of reach. Replacing the
    file by renaming another over it, as downloads do, is safe.
    """

    def __init__(self, path: Path, parts: list[_Part]) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(parts[0].header.metadata))
        self.version = parts[0].header.version
        self.alignment = parts[0].header.alignment
        self.n_bytes = sum(part.size for part in parts)
        self._offsets = parts[0].header.offsets
        self._parts = parts
        tensors: dict[str, Tensor] = {}
        for part in parts:
            for info in part.header.tensors:
                if info.name in tensors:
                    raise GGUFError(
                        f"{part.path}: tensor {info.name!r} at offset {info.offset}: "
                        "an earlier part of the split file holds it too"
                    )
                tensors[info.name] = part.tensor(info)
        self._tensors = MappingProxyType(tensors)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        self.check_unchanged()
        return self._tensors

    def require(
        self,
        key: str,
        kind: type[T],
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> T:
        """The value of ``key``, which must be there, of type ``kind`` and within the bounds.

        ``kind`` is int, float, bool, str, list (of strings) or ``np.ndarray``; floats must be
        finite. The bounds are inclusive. Raises GGUFError naming the key and its offset.
        """
        if key not in self.metadata:
            raise GGUFError(f"{self.path}: key {key!r} is missing ({kind.__name__} expected)")
        value = self.metadata[key]
        where = f"{self.path}: key {key!r} at offset {self._offsets[key]}"
        if type(value) is not kind:
            raise GGUFError(f"{where}: is {type(value).__name__}, expected {kind.__name__}")
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise GGUFError(f"{where}: {value} is not finite")
            low = -math.inf if minimum is None else minimum
            high = math.inf if maximum is None else maximum
            if not low <= value <= high:
                raise GGUFError(f"{where}: {value} is out of range ({low} to {high})")
        return value

    def get(
        self,
        key: str,
        kind: type[T],
        default: D,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> T | D:
        """As :meth:`require`, but ``default`` when the key is absent."""
        if key not in self.metadata:
            return default
        return self.require(key, kind, minimum=minimum, maximum=maximum)

    def check_unchanged(self) -> None:
        """Raise GGUFError if a file was truncated after it was mapped, or this one is closed."""
        if not self._parts:
            raise GGUFError(f"{self.path}: the file is closed")
        for part in self._parts:
            part.check_size()

    def close(self) -> None:
        """Give up the mapping; it goes when the last tensor view does. Idempotent."""
        self._tensors = MappingProxyType({})
        for part in self._parts:
            part.close()
        self._parts = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Mapping(mmap):
    """Keeps its file open, to be read as well."""

    def __init__(self, file: int, *_: object, **__: object) -> None:
        self.file = os.dup(file)
        weakref.finalize(self, os.close, self.file)


class _Part:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Opening a pipe would block, so look before opening.
            if not stat.S_ISREG(path.stat().st_mode):
                raise GGUFError(f"{path}: not a regular file")
            with path.open("rb") as file:
                self.map = _Mapping(file.fileno(), 0, access=ACCESS_READ)
        except ValueError:
            raise GGUFError(f"{path}: header at offset 0: the file is empty") from None
        except OSError as error:
            raise GGUFError(f"{path}: cannot be opened: {error.strerror}") from error
        self.size = len(self.map)
        self.header: Header = read_header(self.map, str(path))

    def split_key(self, key: str, *, default: int | None = None) -> int:
        value = self.header.metadata.get(key, default)
        if type(value) is not int:
            raise GGUFError(f"{self.path}: key {key!r} is {value!r}: a split file needs an integer")
        return value

    def tensor(self, info: TensorInfo) -> Tensor:
        n_rows = math.prod(info.shape[:-1])
        data = np.frombuffer(self.map, np.uint8, info.n_bytes, info.offset)
        return Tensor(info.name, info.qtype, info.shape, data.reshape(n_rows, -1))

    def check_size(self) -> None:
        size = self.map.size()
        if size < self.size:
            raise GGUFError(
                f"{self.path}: truncated from {self.size} to {size} bytes since it was opened; "
                "fetch it again and reload the model"
            )

    def close(self) -> None:
        # BufferError: views of its tensors live on; the last one closes it.
        with contextlib.suppress(BufferError):
            self.map.close()


def _open_split(part: _Part, count: int) -> list[_Part]:
    """All parts of a split file. Their names follow from the opened one's, never from its content,
    so no file can lead outside its own folder."""
    name = _SPLIT_NAME.fullmatch(part.path.name)
    if name is None or int(name[3]) != count:
        raise GGUFError(
            f"{part.path}: key 'split.count' says it is one of {count} files, so its name must end "
            f"in -00001-of-{count:05}.gguf; give it and the others their original names"
        )
    parts = []
    for number in range(1, count + 1):
        path = part.path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf")
        if not path.exists():
            raise GGUFError(f"{path}: part {number} of {count} is missing; fetch it too")
        one = part if path == part.path else _Part(path)
        for key, want in (("split.no", number - 1), ("split.count", count)):
            if one.split_key(key) != want:
                raise GGUFError(f"{path}: key {key!r} is {one.split_key(key)}, expected {want}")
        parts.append(one)
    want, got = parts[0].split_key("split.tensors.count"), sum(len(p.header.tensors) for p in parts)
    if want != got:
        raise GGUFError(
            f"{parts[0].path}: key 'split.tensors.count' is {want}, "
            f"but the {count} parts hold {got}"
        )
    return parts


def let_go(data: NDArray[np.uint8]) -> None:
    """Take the pages of a contiguous part of a mapped tensor out of this process's memory.

    They come back when they are read again. Data that no file is mapped behind is left alone.
    """
    mapping, start = _mapped(data)
    if mapping is None:
        return
    first, last = -(-start // PAGESIZE) * PAGESIZE, (start + data.size) // PAGESIZE * PAGESIZE
    if first < last:
        mapping.madvise(MADV_DONTNEED, first, last - first)


def read_into(memory: NDArray[np.uint8], data: NDArray[np.uint8]) -> None:
    """Copy a contiguous part of a mapped tensor to contiguous memory of its size.

    It is read from the file: no page is mapped for it, which would take longer than to copy it, and
    of a file truncated meanwhile comes a GGUFError and no signal.
    """
    mapping, start = _mapped(data)
    if mapping is None or not hasattr(os, "preadv"):
        np.copyto(memory, data)
        return
    done = 0
    while done < data.size:
        part = os.preadv(mapping.file, [memory.reshape(-1)[done:].data], start + done)
        if part == 0:
            raise GGUFError(
                f"the file ends at {start + done} bytes, but was longer when it was opened; "
                "fetch it again and reload the model"
            )
        done += part


def _mapped(data: NDArray[np.uint8]) -> tuple[_Mapping | None, int]:
    """The mapping that ``data`` is part of, if any, and where in the file it begins."""
    owner: object = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, _Mapping) or not data.size:
        return None, 0
    return owner, data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
