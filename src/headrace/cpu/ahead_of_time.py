"""Numba as a compiler only: LLVM assembly of compiled functions, for the object cache.

Loading Numba takes longer than loading a small model, so a start with compiled code does without.
"""

from __future__ import annotations

from typing import Any

import numba as nb


def step_assembly() -> str:
    """``take_part``, see ``step.take_part``."""
    from headrace.cpu import step

    return _assembly(step.take_part, "take_part", 5)


def interleave_assembly() -> str:
    """``interleave``, see ``interleave.interleave``."""
    from headrace.cpu import interleave

    return _assembly(interleave.interleave, "interleave", 9)


def _assembly(dispatcher: Any, name: str, n_arguments: int) -> str:
    """LLVM assembly with a function ``name`` of int64 arguments that returns an int64."""
    signature = nb.int64(*[nb.int64] * n_arguments)
    dispatcher.compile(signature)
    compiled = dispatcher.overloads[signature.args]
    # Numba's own convention returns a status and takes places for the result and an exception;
    # these functions allocate nothing and raise nothing, so the status is always 0.
    mangled = compiled.fndesc.llvm_func_name
    names = ", ".join(f"i64 %a{i}" for i in range(n_arguments))
    assembly: str = compiled.library.get_llvm_str()
    return f"""{assembly}
define i64 @{name}({names}) {{
  %result = alloca i64
  %exception = alloca ptr
  call i32 @{mangled}(ptr %result, ptr %exception, {names})
  %value = load i64, ptr %result
  ret i64 %value
}}
"""
