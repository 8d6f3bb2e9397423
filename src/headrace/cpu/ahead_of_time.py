"""Numba as a compiler only: the step's LLVM assembly, for the object cache.

Loading Numba takes longer than loading a small model, so a start with compiled code does without.
"""

from __future__ import annotations

import numba as nb

from headrace.cpu import step


def step_assembly() -> str:
    """LLVM assembly with ``int64 take_part(int64 × 5)``, see ``step.take_part``."""
    signature = nb.int64(*[nb.int64] * 5)
    step.take_part.compile(signature)
    compiled = step.take_part.overloads[signature.args]
    # Numba's own convention returns a status and takes places for the result and an exception;
    # the step allocates nothing and raises nothing, so the status is always 0.
    mangled = compiled.fndesc.llvm_func_name
    names = ", ".join(f"i64 %a{i}" for i in range(5))
    assembly: str = compiled.library.get_llvm_str()
    return f"""{assembly}
define i64 @take_part({names}) {{
  %result = alloca i64
  %exception = alloca ptr
  call i32 @{mangled}(ptr %result, ptr %exception, {names})
  %value = load i64, ptr %result
  ret i64 %value
}}
"""
