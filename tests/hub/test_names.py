"""What a name may be, and ``org/repo:QUANT`` against a stand-in for huggingface-hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace import hub
from headrace.errors import HubError
from headrace.hub import huggingface


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a model"
    file.write_bytes(b"GGUF")
    assert hub.resolve(file) == file
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("a model") == Path("a model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/a model") == file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "no such file: missing.gguf"),
        ("models/missing.gguf", "no such file: models/missing.gguf"),
        ("./missing", "no such file: missing"),
        ("/", "/ is a folder: give the path of a .gguf file in it"),
        ("smolm2", "unknown model 'smolm2' (did you mean 'smollm2'?): give the path"),
        ("nothing-like-it", "a known name (smollm2, gemma3:270m), or org/repo:QUANT"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("org/repo:", "unknown model 'org/repo:'"),
        ("nul\0", "unknown model 'nul\\x00'"),
        ("x" * 5000, "unknown model 'xxx"),
    ],
)
def test_a_name_that_means_nothing_is_said(name: str, message: str, cache: Path) -> None:
    with pytest.raises(HubError) as caught:
        hub.resolve(name)
    assert message in str(caught.value)


LISTED = [
    "README.md",
    "mmproj-F16.gguf",
    "Model-1B-Q4_K_M.gguf",
    "Model-1B-Q4_K_S.gguf",
    "Model-1B-UD-Q4_K_XL.gguf",
    "Model-1B-IQ4_XS.gguf",
    "Model-1B.Q8_0.gguf",
    "BF16/Model-1B-BF16-00001-of-00002.gguf",
    "BF16/Model-1B-BF16-00002-of-00002.gguf",
    "F32/Model-1B-F32-00001-of-00003.gguf",
]


@pytest.mark.parametrize(
    ("quant", "files"),
    [
        ("Q4_K_M", ["Model-1B-Q4_K_M.gguf"]),
        ("q8_0", ["Model-1B.Q8_0.gguf"]),
        ("iq4_xs", ["Model-1B-IQ4_XS.gguf"]),
        ("UD-Q4_K_XL", ["Model-1B-UD-Q4_K_XL.gguf"]),
        ("BF16", [f"BF16/Model-1B-BF16-0000{n}-of-00002.gguf" for n in (1, 2)]),
        ("Model-1B-Q4_K_S.gguf", ["Model-1B-Q4_K_S.gguf"]),
    ],
)
def test_the_quantisation_chooses_the_file(quant: str, files: list[str]) -> None:
    assert huggingface.choose("org/repo", LISTED, quant) == files


@pytest.mark.parametrize(
    ("listed", "quant", "message"),
    [
        (LISTED, "Q4_K", "org/repo has no Q4_K: choose one as org/repo:NAME of BF16, F32, IQ4_XS"),
        (LISTED, None, "org/repo has several models that fit: choose one as org/repo:NAME of BF16"),
        (LISTED, "F32", "1 of the 00003 files of F32/Model-1B-F32 are there"),
        (["README.md"], "Q4_0", "org/repo has no .gguf files"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", "of a-Q4_0.gguf, b-Q4_0.gguf"),
    ],
)
def test_what_exists_is_listed_when_the_choice_is_not_clear(
    listed: list[str], quant: str | None, message: str
) -> None:
    with pytest.raises(HubError) as caught:
        huggingface.choose("org/repo", listed, quant)
    assert message in str(caught.value)


def test_a_repository_of_one_model_needs_no_quantisation() -> None:
    assert huggingface.choose("org/repo", ["a.gguf", "README.md"], None) == ["a.gguf"]


class FakeHub:
    """Serves ``LISTED`` from a folder; ``error`` makes every call fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.downloads: list[str] = []

    def HfApi(self) -> FakeHub:  # noqa: N802  (the library's name)
        return self

    def list_repo_files(self, repo: str) -> list[str]:
        if self.error:
            raise self.error
        return LISTED

    def hf_hub_download(self, repo: str, filename: str) -> str:
        self.downloads.append(filename)
        path = self.folder / filename
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
        return str(path)


@pytest.fixture
def fake_hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    utils = SimpleNamespace(disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    return fake


@pytest.mark.parametrize("prefix", ["", "hf.co/", "https://huggingface.co/"])
def test_a_hub_model_is_fetched_once_and_then_needs_no_network(
    fake_hub: FakeHub, tmp_path: Path, prefix: str
) -> None:
    path = hub.resolve(f"{prefix}org/repo:BF16")
    assert path == tmp_path / "BF16/Model-1B-BF16-00001-of-00002.gguf"
    assert len(fake_hub.downloads) == 2
    fake_hub.error = OSError("no network")
    assert hub.resolve("org/repo:BF16") == path
    [cached] = hub.cached_models()
    assert (cached.name, cached.path, cached.size) == ("org/repo:BF16", path, 8)
    with pytest.raises(HubError, match="no network"):
        hub.resolve("org/repo:BF16", refresh=True)
    path.unlink()
    assert hub.cached_models() == []
    with pytest.raises(HubError, match="could not fetch org/repo: no network"):
        hub.resolve("org/repo:BF16")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated: accept its terms at hf.co/org/repo"),
        ("RepositoryNotFoundError", "is not on the Hugging Face hub"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
        ("ConnectError", "could not fetch org/repo: the cause. Check the network"),
    ],
)
def test_the_hub_s_refusals_say_what_to_do(fake_hub: FakeHub, kind: str, message: str) -> None:
    fake_hub.error = type(kind, (Exception,), {})("the cause\nmore lines")
    with pytest.raises(HubError) as caught:
        hub.resolve("org/repo:Q4_K_M")
    assert message in str(caught.value)


def test_the_real_library_offline(tmp_path: Path) -> None:
    """No fake: the names that headrace uses are those that huggingface-hub has."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HEADRACE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "pull", "org/repo:Q4_K_M"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "org/repo has not been fetched before, and HF_HUB_OFFLINE is set" in done.stderr


def test_without_huggingface_hub_the_error_names_the_extra(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'headrace\[hub\]'"):
        hub.resolve("org/repo:Q4_K_M")


@pytest.mark.parametrize("content", ["", "[]", '{"name": "org/repo:Q4_K_M", "files": [1]}', "{"])
def test_a_damaged_record_is_ignored(fake_hub: FakeHub, cache: Path, content: str) -> None:
    (cache / "hub").mkdir(parents=True)
    (cache / "hub/org--repo--Q4_K_M.json").write_text(content)
    assert hub.cached_models() == []
    assert hub.resolve("org/repo:Q4_K_M").name == "Model-1B-Q4_K_M.gguf"
