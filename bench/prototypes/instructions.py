# ruff: noqa
"""Instructions of the products of an 8B: python bench/prototypes/instructions.py; needs no GPU, and pip install nvidia-cuda-nvdisasm.

Prints each kernel's registers, its instructions, and those of its innermost loop with dot products: a tile's.
"""

import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from headrace.cuda.compile import Specialisation, nvrtc

NVDISASM = next(Path(sysconfig.get_path("purelib")).glob("nvidia/**/nvdisasm"))
OUT = {
    "K": 4096, "TYPE0": "Q4_K", "TYPE1": "NONE", "TYPE2": "NONE", "N0": 4096, "N1": 0, "N2": 0, "PAIRED": False,
    "NORM": False, "EPS": 1e-5, "EPILOGUE": "RESIDUAL", "UNIT_ROWS": 16, "ROWS": 1, "FLOAT_ACTIVATIONS": False,
    "WARPS": 16, "STAGES": 2, "EARLY": 2, "PASS_UNITS": 3, "GRID": 132, "LOGIT_SCALE": 1.0, "SOFTCAP": 0.0,
}  # fmt: skip
KERNELS = {
    "output": OUT,
    "gate, up": OUT | {"TYPE1": "Q4_K", "N0": 14336, "N1": 14336, "PAIRED": True, "NORM": True,
                       "EPILOGUE": "PRODUCT", "ACTIVATION": "SILU", "PASS_UNITS": 8},
    "down, Q4_K": OUT | {"K": 14336},
    "down, Q6_K": OUT | {"K": 14336, "TYPE0": "Q6_K"},
}  # fmt: skip

for name, macros in KERNELS.items():
    code, log = nvrtc(Specialisation.of("matvec", macros), "90a")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run(
            [NVDISASM, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    loops = []
    for i, one in enumerate(instructions):
        to = re.search(r"BRA.*(\.L_x_\d+)", one)
        if to and labels[to[1]] <= i and any("IDP" in x for x in instructions[labels[to[1]] : i]):
            loops.append(i - labels[to[1]] + 1)
    registers = re.search(r"Used (\d+) registers", log)[1]
    print(f"{name:11} {registers} registers, {len(instructions)} in all, {min(loops)} a tile")
