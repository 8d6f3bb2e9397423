"""``headrace serve``: an OpenAI-compatible server for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.options import Context, Threads
from headrace.errors import HeadraceError

_NETWORK, _LIMITS, _LOG = "Network", "Limits", "Log"


def _option(name: str, text: str, panel: str, default: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=default, **more)


_Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A path, a known name, or org/repo:QUANT.")
]
_Config = Annotated[
    Path | None, typer.Option("--config", help="A TOML file of settings, named as the options.")
]
_Name = Annotated[
    str | None, typer.Option("--name", help="The model's id for clients.", show_default="MODEL")
]
_Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or reference.", show_default="auto")
]
_CacheTokens = Annotated[
    int | None,
    typer.Option(help="KV positions of all requests.", show_default="four contexts"),
]
_Sequences = Annotated[
    int | None, typer.Option(help="Completions that run at once.", show_default="32")
]
_Invariant = Annotated[
    bool | None,
    typer.Option(
        "--batch-invariant/--no-batch-invariant",
        help="Answers do not depend on how many run at once: slower for few, on a GPU.",
        show_default="no",
    ),
]
_CacheType = Annotated[
    str | None,
    typer.Option(
        "--cache-type",
        help="Keys and values: f16, or on a GPU q8_0 (half the memory).",
        show_default="f16",
    ),
]
_Host = Annotated[str | None, _option("--host", "Address to listen on.", _NETWORK, "127.0.0.1")]
_Port = Annotated[int | None, _option("--port", "Port; 0: any free one.", _NETWORK, "8000")]
_Hosts = Annotated[
    str | None,
    _option("--allowed-hosts", "Names clients may use for it, comma-separated.", _NETWORK, "local"),
]
_Origins = Annotated[
    str | None,
    _option("--allowed-origins", "Web pages that may ask, comma-separated.", _NETWORK, "its own"),
]
_KeyFile = Annotated[
    Path | None,
    _option("--api-key-file", "API keys, one a line. (Or HEADRACE_API_KEYS.)", _NETWORK, "none"),
]
_Waiting = Annotated[
    int | None, _option("--max-waiting", "Completions that may wait; then 429.", _LIMITS, "64")
]
_Connections = Annotated[
    int | None, _option("--max-connections", "Connections at once.", _LIMITS, "512")
]
_Body = Annotated[int | None, _option("--max-body", "Bytes of a request.", _LIMITS, "4194304")]
_Choices = Annotated[
    int | None, _option("--max-choices", "Completions of one request.", _LIMITS, "16")
]
_Inputs = Annotated[
    int | None, _option("--max-inputs", "Texts of one embeddings request.", _LIMITS, "64")
]
_HeaderTimeout = Annotated[
    float | None, _option("--header-timeout", "Seconds for headers to arrive.", _LIMITS, "10")
]
_BodyTimeout = Annotated[
    float | None, _option("--body-timeout", "Seconds for a body to arrive.", _LIMITS, "20")
]
_WriteTimeout = Annotated[
    float | None, _option("--write-timeout", "Seconds a reader may stand still.", _LIMITS, "30")
]
_RequestTimeout = Annotated[
    float | None, _option("--request-timeout", "Seconds for an answer.", _LIMITS, "600")
]
_DrainTimeout = Annotated[
    float | None, _option("--drain-timeout", "Seconds for answers to end at exit.", _LIMITS, "20")
]
_LogFormat = Annotated[str | None, _option("--log-format", "json or text.", _LOG, "json")]
_LogLevel = Annotated[
    str | None, _option("--log-level", "debug, info, warning or error.", _LOG, "info")
]


def serve(
    model: _Model = None,
    config: _Config = None,
    name: _Name = None,
    device: _Device = None,
    threads: Threads = None,
    context: Context = None,
    cache_tokens: _CacheTokens = None,
    max_sequences: _Sequences = None,
    batch_invariant: _Invariant = None,
    cache_type: _CacheType = None,
    host: _Host = None,
    port: _Port = None,
    allowed_hosts: _Hosts = None,
    allowed_origins: _Origins = None,
    api_key_file: _KeyFile = None,
    max_waiting: _Waiting = None,
    max_connections: _Connections = None,
    max_body: _Body = None,
    max_choices: _Choices = None,
    max_inputs: _Inputs = None,
    header_timeout: _HeaderTimeout = None,
    body_timeout: _BodyTimeout = None,
    write_timeout: _WriteTimeout = None,
    request_timeout: _RequestTimeout = None,
    drain_timeout: _DrainTimeout = None,
    log_format: _LogFormat = None,
    log_level: _LogLevel = None,
) -> None:
    """Serve a model to OpenAI's clients, and a chat page to browsers.

    Listens on this machine only unless --host says otherwise. Every option can also be set in the
    environment (HEADRACE_PORT=9000) or in the --config file (port = 9000); options count most.
    """
    flags = {key: value for key, value in locals().items() if key not in ("config", "api_key_file")}
    for key in ("allowed_hosts", "allowed_origins"):
        if flags[key] is not None:
            flags[key] = tuple(item.strip() for item in flags[key].split(",") if item.strip())
    if api_key_file is not None:
        from headrace.cli.console import read_text

        lines = read_text(api_key_file).splitlines()
        flags["api_keys"] = tuple(line.strip() for line in lines if line.strip())
    try:
        from headrace.serve.server import serve as run
    except ImportError as error:
        if (error.name or "").startswith("headrace"):
            raise
        raise HeadraceError(
            f"the server needs the extra 'serve' ({error.name} is missing): "
            "pip install 'headrace[serve]'"
        ) from None
    from headrace.serve.settings import load_settings

    run(load_settings(flags, config))
