"""What goes wrong has a name, the sizes and a way out, and leaves the process usable."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import batches
import numpy as np
import pytest

from headrace.cuda import arguments as c
from headrace.cuda import compile
from headrace.cuda.compile import Specialisation, host_library
from headrace.cuda.device import Launch
from headrace.cuda.host import HostDevice
from headrace.cuda.runner import CUDARunner
from headrace.errors import DeviceError, DeviceMemoryError, ModelError
from headrace.gguf.reader import open_gguf
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.synth import write_synthetic


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_synthetic(path, "llama-tiny", "Q8_0")
    return load_decoder(open_gguf(path))


def test_a_model_that_does_not_fit_says_so_and_frees_what_it_took(decoder: Decoder) -> None:
    device = HostDevice(memory_limit=80 << 20)
    with pytest.raises(DeviceMemoryError, match=r"activations: [\d,]+ bytes wanted, [\d,]+ free"):
        CUDARunner(decoder, device, max_rows=1 << 15)
    assert device.free_bytes() == 80 << 20


def test_a_cache_that_does_not_fit_leaves_the_runner_usable(decoder: Decoder) -> None:
    runner = CUDARunner(decoder, HostDevice(memory_limit=256 << 20), max_rows=4)
    with pytest.raises(DeviceMemoryError, match="KV cache"):
        runner.allocate_cache(100_000)
    runner.allocate_cache(2)
    assert runner.step(batches.one_sequence([1, 2])).shape == (2, 512)
    assert dict(runner.memory_plan())["keys 0"] == 2 * 2 * 64 * 64 * 2
    runner.close()
    runner.close()


def test_steps_that_would_leave_the_cache_are_refused(decoder: Decoder) -> None:
    runner = CUDARunner(decoder, HostDevice(), max_rows=4)
    with pytest.raises(DeviceError, match="no KV cache yet"):
        runner.step(batches.one_sequence([1]))
    runner.allocate_cache(2)
    with pytest.raises(DeviceError, match="position 128 lies beyond a cache of 2 pages of 64"):
        runner.step(batches.one_sequence([1], start=128, pages=[0, 1, 0]))
    with pytest.raises(DeviceError, match="uses a page outside 0 … 1"):
        runner.step(batches.one_sequence([1], pages=[2]))
    with pytest.raises(DeviceError, match="token ids must be in 0 … 511"):
        runner.step(batches.one_sequence([512]))
    runner.close()


def test_copied_pages_continue_as_the_original(decoder: Decoder) -> None:
    runner = CUDARunner(decoder, HostDevice(), max_rows=4)
    runner.allocate_cache(3)
    runner.step(batches.one_sequence([1, 2, 3], pages=[0]))
    runner.copy_page(0, 2)
    copied = runner.step(batches.one_sequence([4], start=3, pages=[2]))
    np.testing.assert_array_equal(
        copied, runner.step(batches.one_sequence([4], start=3, pages=[0]))
    )
    runner.close()


def test_missing_and_misshapen_weights_are_named(decoder: Decoder) -> None:
    name = "blk.1.ffn_up.weight"
    without = {key: tensor for key, tensor in decoder.weights.items() if key != name}
    with pytest.raises(ModelError, match=name):
        CUDARunner(replace(decoder, weights=without), HostDevice())
    wrong = without | {name: decoder.weights["blk.1.attn_q.weight"]}
    with pytest.raises(ModelError, match="256 x 256 where 512 x 256 is expected"):
        CUDARunner(replace(decoder, weights=wrong), HostDevice())


def test_no_usable_gpu_is_an_error_that_says_what_to_do() -> None:
    from headrace.cuda.context import device_count
    from headrace.cuda.gpu import CUDADevice

    with pytest.raises(DeviceError, match=r"are usable: check `nvidia-smi`.*--device cpu"):
        CUDADevice(index=device_count())


READ = Specialisation.of("read", {"WARPS": 1})


def test_a_damaged_cache_entry_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    path = host_library(READ, 90)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert host_library(READ, 90) == path
    assert path.stat().st_size == len(whole)
    other = Specialisation.of("read", {"WARPS": 2})
    assert host_library(other, 90) != path  # every constant is in the key
    assert not list(path.parent.glob(".new-*"))


def test_a_launch_with_the_wrong_struct_is_refused() -> None:
    launch = Launch(READ, (1, 1, 1), 32, 0, c.Rows())
    with pytest.raises(DeviceError, match="arguments of 48 bytes for a kernel that takes 24"):
        HostDevice().launch(launch)


def test_kernels_that_do_not_compile_show_the_compilers_words() -> None:
    with pytest.raises(DeviceError, match="NO_SUCH_THING"):
        host_library(Specialisation.of("read", {"WARPS": "NO_SUCH_THING"}), 90)


def test_the_compiler_is_named_without_being_imported() -> None:
    code = (
        "import sys; from headrace.cuda.compile import compiler_version as v; print(v());"
        "assert 'cuda.core' not in sys.modules; import cuda.core; print(cuda.core.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, core = done.stdout.splitlines()
    assert re.fullmatch(rf"\(\d+, \d+\) cuda-core {re.escape(core)}", version)


@pytest.mark.parametrize("missing", ["cuda-core", "cuda.bindings", "libnvrtc"])
def test_packages_that_are_missing_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "cuda-core":
        monkeypatch.setattr(metadata, "version", _raise(PackageNotFoundError("cuda-core")))
    elif missing == "cuda.bindings":
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    else:
        from cuda.bindings import nvrtc

        monkeypatch.setattr(nvrtc, "nvrtcVersion", _raise(RuntimeError("no libnvrtc.so.13")))
    compile.compiler_version.cache_clear()
    with pytest.raises(DeviceError, match=r"pip install 'headrace\[cuda\]'"):
        compile.compiler_version()


def _raise(error: Exception) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call
