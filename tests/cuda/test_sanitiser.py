"""The kernels under AddressSanitizer: one launch of each, in a Python that has it loaded.

Device memory is allocated array by array, so that a read or write past one is seen; shared memory
that an asynchronous copy has not yet filled is poisoned.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = [
    "test_layout.py::test_reorder_kernel_matches_its_definition[host-90-5-256-12]",
    "test_matvec.py::test_three_matrices_of_three_types_with_norm_and_bias[host-90]",
    "test_matvec.py::test_three_matrices_of_three_types_with_norm_and_bias[host-80]",
    "test_matvec.py::test_residual_adds_and_quantises_for_the_next_norm[host-90-False]",
    "test_attend.py::test_rows_of_several_slots_over_many_splits[host-90-f16]",
    "test_attend.py::test_rotary_norms_rotates_and_fills_the_cache[host-90-q8_0-norms0]",
    "test_attend.py::test_head_shapes[host-90-q8_0-3-1-80]",
    "test_cache_writers.py::test_rotary[host-90-80]",
    "test_cache_writers.py::test_projections[host-90-gemm-6-2-96-10]",
    "test_prompt_attend.py::test_head_shapes[host-90-q8_0-4-2-64]",
    "test_skinny.py::test_residual_adds_and_rounds_for_the_next_norm[host-90-2]",
    "test_token.py::test_as_the_launches[llama-tiny-Q4_K_M-3-2]",
    "test_matmul.py::test_three_matrices_of_three_types_with_norm_and_bias[host-90]",
    "test_matmul.py::test_three_matrices_of_three_types_with_norm_and_bias[host-80]",
    "test_matmul.py::test_residual_adds_and_rounds_for_the_next_norm[host-90]",
    "test_prompt_attend.py::test_rows_of_several_slots[host-90-q8_0]",
    "test_prompt_attend.py::test_head_shapes[host-90-f16-3-1-80]",
    "test_sample.py::test_penalties_and_bias_look_at_the_history[host-90]",
    "test_sample.py::test_log_probabilities_are_the_models_own[host-90-5]",
    "test_executor.py::test_feed_forward_by_name_by_index_and_from_the_host"
    "[host-90-int8 activations-llama-tiny-Q4_K_M-1]",
]


def test_no_kernel_reads_or_writes_outside_its_arrays() -> None:
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    environment = os.environ | {
        "HEADRACE_SANITISE": "1",
        "LD_PRELOAD": found.stdout.strip(),
        # Python leaks by design; fibres have stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-x", *(str(folder / case) for case in CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{len(CASES)} passed" in done.stdout
