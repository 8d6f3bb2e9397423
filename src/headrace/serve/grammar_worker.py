"""The child process that tries a grammar first; run by path, never imported by headrace.

llguidance bounds its own work, but its compiler recurses, and a chain of ``$ref`` overflows the
stack: that ends a process, and must not be the server's. Here it may: the kernel bounds the time
and the memory, and the stack is smaller than the one the server compiles on.

stdin: JSON ``{"grammar", "limits"}``. stdout: JSON ``{"error"}``, "" when the grammar compiles and
allows at least one token.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30


class _Bytes:
    """A vocabulary of the 256 bytes and an end: enough to know whether a grammar can begin."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: Any) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def main() -> None:
    import llguidance

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    request = json.load(sys.stdin.buffer)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    limits = llguidance.LLParserLimits(**request["limits"])
    matcher = llguidance.LLMatcher(tokenizer, request["grammar"], log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    json.dump({"error": matcher.get_error()}, sys.stdout)


if __name__ == "__main__":
    main()
