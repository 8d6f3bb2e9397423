"""The child process that renders chat templates; run by path, never imported by headrace.

A template is a program from a file that anyone may have made. Jinja's sandbox keeps it from
reaching Python; this process keeps it from taking time and memory: both limits are the kernel's.

Frames on stdin and stdout: 4 bytes length (little-endian), then that many bytes. The first frame in
is the set-up ``{"path", "here", "cpu_s", "memory_bytes", "output_chars", "twins"}``, each other
``{"template", "trusted", "context"}``, all JSON. Each of those is answered by one byte of outcome
(``OK``, ``REFUSED`` by the template itself, ``FAILED``) and UTF-8 text in which caller text keeps
its twins (surrogates).
"""

from __future__ import annotations

import importlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

OK, REFUSED, FAILED = b"o", b"r", b"f"


def main() -> None:
    setup = json.loads(_read_frame() or b"{}")
    sys.path[:] = setup["path"]
    limit = setup["memory_bytes"]
    # The kernel's own limits, before any template is seen. SIGPROF is left to its default action:
    # it ends the process whatever Python is doing.
    renderer = _Renderer(setup["here"], setup["twins"], setup["output_chars"])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    while (frame := _read_frame()) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
        outcome, text = renderer.answer(frame)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = outcome + text.encode("utf-8", "surrogatepass")
        sys.stdout.buffer.write(len(reply).to_bytes(4, "little") + reply)
        sys.stdout.buffer.flush()


def _read_frame() -> bytes | None:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        return None
    return sys.stdin.buffer.read(int.from_bytes(head, "little"))


class _Renderer:
    def __init__(self, here: str, twins: str, output_chars: int) -> None:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox

        # Not through the package: importing that would cost more than everything else here.
        sys.path.insert(0, here)
        caller_text = importlib.import_module("caller_text")
        del sys.path[0]
        text_type = caller_text.CallerText
        text_type.to_twins, text_type.from_twins = caller_text.twin_tables(twins)
        self._mark = text_type.mark
        self._output_chars = output_chars

        class Refused(jinja2.TemplateError):
            pass

        class Generation(jinja2.ext.Extension):
            """``{% generation %}`` marks what is trained on; for rendering it means nothing."""

            tags = {"generation"}  # noqa: RUF012  # as Jinja's documentation writes it

            def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
                next(parser.stream)
                body: list[jinja2.nodes.Node] = parser.parse_statements(
                    ("name:endgeneration",), drop_needle=True
                )
                return body

        def raise_exception(message: str) -> None:
            raise Refused(str(message))

        # What Hugging Face's chat templates are written for (transformers, chat_template_utils).
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._refused = Refused
        self._compile = lru_cache(maxsize=8)(environment.from_string)

    def answer(self, frame: bytes) -> tuple[bytes, str]:
        try:
            request = json.loads(frame)
            context = {name: self._mark(value) for name, value in request["context"].items()}
            for message in context["messages"]:
                # A role is a word of the protocol; templates build control tokens around it.
                role = message["role"]
                if role in request["roles"]:
                    message["role"] = next(r for r in request["roles"] if r == role)
            text = self._compile(request["template"]).render(**context, **request["trusted"])
        except self._refused as error:
            return REFUSED, str(error)[:1000]
        except MemoryError:
            return FAILED, "it needs more memory than is allowed"
        except RecursionError:
            return FAILED, "it is nested too deeply"
        except Exception as error:
            return FAILED, f"{type(error).__name__}: {str(error)[:1000]}"
        if len(text) > self._output_chars:
            return FAILED, f"it made {len(text)} characters; {self._output_chars} are allowed"
        return OK, text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


if __name__ == "__main__":
    main()
