"""``headrace chat``: a conversation on the terminal, or a line at a time from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headrace.cli import console
from headrace.cli import options as opt
from headrace.errors import ContextOverflowError, HeadraceError, RequestError

if TYPE_CHECKING:
    from headrace.api import Model

HELP = """\
  /help           this
  /clear          forget the conversation
  /retry          another answer to the last message
  /system TEXT    set the system message and start again; without TEXT, remove it
  /set NAME VALUE change a sampling option: temperature, top_k, top_p, min_p, seed, …
  /set            show the options
  /stats          tokens and speed of the last answer, and the room left
  /quit           leave, as does Ctrl-D

  Alt-Enter (or Esc, Enter) begins a new line; so does Enter between two lines of \"\"\".
  Ctrl-C stops an answer; at the prompt it drops what was typed."""

_SETTINGS: dict[str, Callable[[str], float | int | None]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "repeat_last_n": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": lambda text: None if text == "random" else int(text),
    "max_tokens": lambda text: None if text == "none" else int(text),
}


@opt.with_sampling
def chat(
    model: opt.ModelName,
    system: opt.System = None,
    *,
    options: opt.Sampling,
    context: opt.Context = None,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    cache_type: opt.CacheType = "f16",
) -> None:
    """Talk with a model. /help lists what can be typed; Ctrl-D leaves."""
    with (
        console.Status() as status,
        console.load(
            model,
            status,
            device=device,
            context=context,
            threads=threads,
            chat=True,
            cache_type=cache_type,
        ) as loaded,  # fmt: skip
    ):
        if not console.has_chat_template(loaded):
            raise RequestError(
                f"{model} has no chat template, it only continues text: use 'headrace run {model}'"
            )
        conversation = Conversation(loaded, status, options, system)
        if sys.stdin.isatty():
            console.say(f"{model} on {loaded.engine.runner.device_name}; /help for help")
        for message in _messages():
            with _ctrl_c_calls(lambda: conversation.stop()):  # whatever it is by then
                if not conversation.take(message):
                    break


class Conversation:
    """The messages so far, and the answers to what is typed."""

    def __init__(
        self, model: Model, status: console.Status, options: opt.Sampling, system: str | None
    ) -> None:
        self.model = model
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.stats = "nothing was answered yet"
        self.stop: Callable[[], None] = lambda: None  # ends the answer that is being made
        self._status = status
        self._system = system
        self._begin()

    def take(self, text: str) -> bool:
        """Obey a command or answer a message; False to leave. Errors are said, not raised."""
        try:
            if text.startswith("/"):
                return self._obey(*text[1:].partition(" ")[::2])
            self._ask(text)
        except ContextOverflowError as error:
            console.say(f"{error}; or /clear to start again")
        except HeadraceError as error:
            console.say(str(error))
        return True

    def _begin(self) -> None:
        self.messages.clear()
        if self._system:
            self.messages.append({"role": "system", "content": self._system})

    def _obey(self, command: str, argument: str) -> bool:
        argument = argument.strip()
        match command:
            case "help" | "?":
                console.say(HELP)
            case "clear":
                self._begin()
            case "retry":
                self._retry()
            case "system":
                self._system = argument or None
                self._begin()
            case "set":
                self._set(argument)
            case "stats":
                console.say(self.stats)
            case "quit" | "exit" | "bye":
                return False
            case _:
                raise RequestError(f"there is no command /{command}: /help lists them")
        return True

    def _ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except BaseException:
            self.messages.pop()
            raise

    def _retry(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise RequestError("there is no answer to try again")
        previous = self.messages.pop()
        try:
            self._answer()
        except BaseException:
            self.messages.append(previous)
            raise

    def _answer(self) -> None:
        self._status("reading (the first run compiles kernels)")
        with self.model.stream_chat(self.messages, **self.options) as stream:
            self.stop = stream.close
            console.write(stream, self._status)
        done = stream.completion
        self.messages.append({"role": "assistant", "content": done.text})
        used = done.timings.prompt_tokens + len(done.tokens)
        self.stats = f"{console.speed(done)}; {used:,} of {self.model.context:,} tokens used"
        if done.finish_reason == "cancelled":
            console.say("(stopped)")
        elif done.finish_reason == "length":
            console.say("(cut off: max_tokens or the context is used up)")

    def _set(self, argument: str) -> None:
        from headrace.sampling import SamplingParams

        if not argument:
            table = [(name, str(self.options.get(name))) for name in _SETTINGS]
            console.say(console.columns(table, indent="  "))
            return
        name, _, text = argument.replace("=", " ").partition(" ")
        name = name.replace("-", "_")
        if name not in _SETTINGS:
            raise RequestError(f"there is no option {name!r}: use one of {', '.join(_SETTINGS)}")
        try:
            value = _SETTINGS[name](text.strip())
        except ValueError:
            raise RequestError(f"{name} takes a number, not {text.strip()!r}") from None
        if name != "max_tokens":
            SamplingParams(**{name: value})  # type: ignore[arg-type]  # refuses what is out of range
        self.options[name] = value  # type: ignore[literal-required]


@contextmanager
def _ctrl_c_calls(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``stop``, however often it is pressed, instead of ending the program."""
    before = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _messages() -> Iterator[str]:
    """What is typed or piped, message by message, until Ctrl-D or /quit. Blank ones are left out.

    Lines between two lines of \"\"\" are one message.
    """
    read = _terminal_reader() if sys.stdin.isatty() else sys.stdin.readline
    while text := read():
        if text.strip().startswith('"""'):
            text = _block(text.strip()[3:], read)
        if text.strip():
            yield text.strip()


def _block(line: str, read: Callable[[], str]) -> str:
    """``line`` (what follows the opening quotes) and the lines up to one that ends in \"\"\"."""
    lines = []
    while not line.rstrip().endswith('"""'):
        lines.append(line)
        if not (line := read()):  # the end of the input ends it too
            return "\n".join(lines)
        line = line.rstrip("\n")
    return "\n".join([*lines, line.rstrip()[:-3]])


def _terminal_reader() -> Callable[[], str]:
    """Reads a message with its newline as readline does; empty at Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=InMemoryHistory(), key_bindings=keys)

    def read() -> str:
        while True:
            try:
                return session.prompt("> ", prompt_continuation="  ") + "\n"
            except KeyboardInterrupt:
                continue
            except EOFError:
                return ""

    return read
