"""The command line: one file a command, over the same library calls anyone can make."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The ``headrace`` program. Exit codes: 0, 1 for any error, 2 for help that was not asked for,
    130 for Ctrl-C."""
    _open_missing_streams()
    debug, arguments = _take_debug(sys.argv[1:])
    try:
        from headrace.cli.app import app

        code = app(arguments, prog_name="headrace", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        if kind == "Abort":  # what typer makes of Ctrl-C while it parses
            sys.exit(130)
        if kind == "NoArgsIsHelpError":  # the help has been printed
            sys.exit(2)
        print(f"headrace: {_explain(error)}", file=sys.stderr)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _open_missing_streams() -> None:
    """What the caller closed (``>&-``) reads and writes nothing; Python has None in its place."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """``--debug`` counts wherever it stands (before ``--``), so that it can be added at the end."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(options) < end, options + arguments[end:]


def _explain(error: Exception) -> str:
    """``error`` on one line."""
    from headrace.errors import HeadraceError

    if isinstance(error, HeadraceError):
        message = str(error)
    elif hasattr(error, "format_message"):  # a usage error of click, whose home typer has moved
        message = f"{error.format_message()} (see 'headrace --help')"
        if context := getattr(error, "ctx", None):
            message = f"{error.format_message()} (see '{context.command_path} --help')"
    elif isinstance(error, OSError):
        message = str(error)
    else:
        message = (
            f"internal error: {type(error).__name__}: {error} "
            "(please report it, with what --debug adds)"
        )
    return " ".join(message.split())
