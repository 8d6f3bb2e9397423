"""Chat templates: messages to text and token ids, as the file's own template says.

Templates are rendered in a child process with hard limits (``template_worker``); the caller's text
is kept apart from the template's (``caller_text``). Why: docs/decisions, "Chat templates".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import TemplateError
from headrace.text.caller_text import MAX_TWINS, twin_tables
from headrace.text.template_process import Limits, Outcome, TemplateProcess
from headrace.text.tokenizer import Tokenizer

_KEY = "tokenizer.chat_template"
_ROLES = (
    *("system", "user", "assistant", "tool", "developer", "function", "model", "ipython"),
    *("context", "documents", "tools", "available_tools", "tool_response", "thinking"),
)


class ChatTemplate:
    """The chat template of a model. Safe to share between threads; one render at a time.

    The child process starts on first use, or by :meth:`prepare`; :meth:`close` ends it.
    """

    def __init__(
        self, sources: Mapping[str, str], tokenizer: Tokenizer, limits: Limits | None = None
    ) -> None:
        """``sources``: Jinja source by name; "default" is the usual one, and "tool_use", where
        there is one, renders requests with tools."""
        if "default" not in sources:
            raise TemplateError(f"no default chat template among {', '.join(sources) or 'none'}")
        characters = "".join(sorted(tokenizer.control_characters))
        if len(characters) > MAX_TWINS:
            raise TemplateError(
                f"the control tokens of this vocabulary are written with {len(characters)} "
                f"different characters; at most {MAX_TWINS} can be kept apart from user text"
            )
        self._sources = dict(sources)
        self._tokenizer = tokenizer
        self._to_plain = twin_tables(characters)[1]
        self._process = TemplateProcess(limits or Limits(), characters)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits | None = None
    ) -> ChatTemplate:
        """The template(s) of a GGUF file. Raises TemplateError if it has none."""
        sources = {}
        for key, value in metadata.items():
            if key == _KEY or key.startswith(_KEY + "."):
                if not isinstance(value, str):
                    raise TemplateError(f"{key} must be a string")
                sources[key[len(_KEY) + 1 :] or "default"] = value
        if not sources:
            raise TemplateError(
                f"the file has no chat template ({_KEY}): it is probably a base model, not one "
                "tuned for chat. Give it a plain prompt to continue instead (generate), or take an "
                "instruction-tuned model"
            )
        if "default" not in sources and len(sources) == 1:
            sources["default"] = next(iter(sources.values()))
        return cls(sources, tokenizer, limits)

    def prepare(self) -> None:
        """Start the child process, without waiting for it."""
        self._process.start()

    def close(self) -> None:
        """End the child process. Idempotent; a later render starts a new one."""
        self._process.stop()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model's text, control tokens written out.

        messages: each with a "role" and a "content" (str, None, or a list of text parts, which are
        joined). tools: JSON schemas. variables: whatever else this template knows
        (``enable_thinking=False``). Raises TemplateError.
        """
        marked = self._render(messages, add_generation_prompt, tools, variables)
        return marked.translate(self._to_plain)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of :meth:`render`'s text, in which control tokens come from the template only.

        The caller's text never becomes a control token, whatever it spells; otherwise the ids are
        those of the whole text with its control tokens parsed. BOS comes first, once, if the file
        asks for it. Raises TemplateError and TokenizerError.
        """
        marked = self._render(messages, add_generation_prompt, tools, variables)
        plain = marked.translate(self._to_plain)
        return self._tokenizer.encode_guarded(plain, marked, bos=True)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        context = {
            "documents": None,
            **variables,
            "messages": [_message(m, i) for i, m in enumerate(messages)],
            "tools": list(tools) if tools else None,
        }
        trusted = {
            "add_generation_prompt": bool(add_generation_prompt),
            "bos_token": self._text_of(self._tokenizer.bos_id),
            "eos_token": self._text_of(self._tokenizer.eos_id),
        }
        if taken := sorted(trusted.keys() & variables.keys()):
            raise TemplateError(f"{taken[0]} cannot be given: the file says what it is")
        request = {
            "template": self._sources[name],
            "roles": _ROLES,
            "context": context,
            "trusted": trusted,
        }
        outcome, text = self._process.ask(_to_json(request))
        if outcome is Outcome.OK:
            return text
        text = text.translate(self._to_plain).encode(errors="replace").decode()
        if outcome is Outcome.REFUSED:
            raise TemplateError(f"the chat template refused the messages: {text}")
        raise TemplateError(f"the chat template failed: {text}")

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokenizer.token_text(token_id)


def _message(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f'messages[{at}] must be an object with a "role"')
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_text_part(part, f"messages[{at}].content") for part in content)
    elif not (content is None or isinstance(content, str)):
        raise TemplateError(f"messages[{at}].content must be text, not {type(content).__name__}")
    return {**message, "content": content}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise TemplateError(f"{where} holds a part of type {kind!r}; only text parts can be read")


def _to_json(request: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise TemplateError("the messages hold a lone surrogate, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"messages, tools and variables must be plain JSON: {error}") from None
