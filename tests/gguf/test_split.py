"""Files split in parts are opened together, and only when they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.errors import GGUFError
from headrace.gguf import QuantType, open_gguf
from headrace.gguf.writer import TensorSource, write_gguf


def part_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.gguf"


def write_parts(folder: Path, count: int = 3, **changes: dict[str, Any]) -> list[Path]:
    """``changes``: metadata overrides by ``part<number>``; None removes a key."""
    paths = []
    for number in range(1, count + 1):
        metadata: dict[str, Any] = {
            "split.no": np.uint16(number - 1),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(count),
        }
        if number == 1:
            metadata["general.architecture"] = "llama"
        metadata |= changes.get(f"part{number}", {})
        metadata = {key: value for key, value in metadata.items() if value is not None}
        paths.append(folder / part_name(number, count))
        weights = np.full(4, number, np.float32)
        write_gguf(
            paths[-1], metadata, [TensorSource(f"t{number}", QuantType.F32, (4,), [weights])]
        )
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_part_opens_all(tmp_path: Path, opened: int) -> None:
    paths = write_parts(tmp_path)
    with open_gguf(paths[opened]) as file:
        values = {name: t.data.view(np.float32)[0, 0] for name, t in file.tensors.items()}
        assert values == {"t1": 1, "t2": 2, "t3": 3}
        assert file.metadata["general.architecture"] == "llama"
        assert file.n_bytes == sum(path.stat().st_size for path in paths)


def test_missing_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(GGUFError, match=f"{part_name(2, 3)}: part 2 of 3 is missing"):
        open_gguf(paths[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part2": {"split.no": np.uint16(2)}}, "'split.no' is 2, expected 1"),
        ({"part2": {"split.count": np.uint16(4)}}, "'split.count' is 4, expected 3"),
        ({"part2": {"split.no": None}}, "'split.no' is None: a split file needs an integer"),
        ({"part1": {"split.tensors.count": np.int32(9)}}, "is 9, but the 3 parts hold 3"),
        ({"part1": {"split.tensors.count": None}}, "'split.tensors.count' is None"),
        ({"part1": {"split.count": "3"}}, "'split.count' is '3': a split file needs an integer"),
        ({"part1": {"split.count": np.uint16(65535)}}, "one of 65535 files, so its name must end"),
    ],
)
def test_inconsistent_parts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    paths = write_parts(tmp_path, **changes)
    with pytest.raises(GGUFError, match=message):
        open_gguf(paths[0])


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    metadata = {"split.no": 1, "split.count": 3, "split.tensors.count": 3}
    write_gguf(paths[1], metadata, [TensorSource("t1", QuantType.F32, (4,), [bytes(16)])])
    with pytest.raises(GGUFError, match=r"'t1' .* an earlier part"):
        open_gguf(paths[0])


def test_a_renamed_part_never_looks_elsewhere(tmp_path: Path) -> None:
    """Names of the other parts come from this one's name, in its own folder, from nothing else."""
    paths = write_parts(tmp_path)
    (tmp_path / "alone").mkdir()
    alone = paths[0].rename(tmp_path / "alone" / part_name(1, 3))
    with pytest.raises(GGUFError, match="part 2 of 3 is missing"):
        open_gguf(alone)
    with pytest.raises(GGUFError, match=r"its name must end in -00001-of-00003\.gguf"):
        open_gguf(alone.rename(alone.with_name("..-model.gguf")))


def test_a_dotted_path_to_the_parts_is_fine(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_parts(tmp_path)
    assert len(open_gguf(tmp_path / "sub" / ".." / part_name(2, 3)).tensors) == 3
