"""Peak memory of a process that loads a real model on the CPU and answers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, pathlib, re, sys
import headrace
model = headrace.load(sys.argv[1], device="cpu", context=512)
made = model.generate("The capital of France is", max_tokens=32, temperature=0, ignore_eos=True)
model.close()
# Not getrusage: that begins with what the process that started this one had in memory.
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps({
    "tokens": len(made.tokens),
    "peak": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]),
    "numba": "numba" in sys.modules,
}))
"""

CONTEXT_TOKENS = 512


@pytest.mark.real_model
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_bounded_by_the_file_and_the_cache(smollm2_path):
    """The mapped weights count where they were touched, so an expanded copy would show."""

    def run() -> dict:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, smollm2_path],
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run()  # compiles what is not in the kernel cache
    warm = run()
    layers, kv_heads, head_dim = 30, 3, 64  # SmolLM2-135M
    cache = CONTEXT_TOKENS * layers * kv_heads * head_dim * 2 * 2  # keys and values, two bytes each
    assert warm["tokens"] == 32
    assert not warm["numba"], "a warm start loaded the compiler"
    assert warm["peak"] <= smollm2_path.stat().st_size + cache + 400e6
