"""Text from the caller inside a template, told apart from the template's own.

Every character of the caller's text that control tokens are written with is replaced, one for one,
by a private twin. Whatever a template does to the text, a twin stays a twin: no slicing, joining
or trimming of the caller's text can spell a control token. Twins are low surrogates, which no
valid text contains.

:class:`CallerText` makes the twins invisible to the template's own questions (``==``, ``in``,
``startswith``, ``split`` …), so that templates take the branches they would take for plain text.
A template that takes a way around it loses at most that likeness, never a twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, SupportsIndex

FIRST_TWIN = 0xDC00
MAX_TWINS = 0x400


def twin_tables(characters: str) -> tuple[dict[int, int], dict[int, int]]:
    """``str.translate`` tables to twins and back, for at most MAX_TWINS ``characters``."""
    pairs = [(ord(char), FIRST_TWIN + i) for i, char in enumerate(characters)]
    return dict(pairs), {twin: code for code, twin in pairs}


class CallerText(str):
    """A string that holds twins and answers as if it did not."""

    __slots__ = ()
    to_twins: ClassVar[dict[int, int]] = {}
    from_twins: ClassVar[dict[int, int]] = {}

    @classmethod
    def mark(cls, value: Any) -> Any:
        """``value`` (as JSON gives it) with every string in it, keys too, marked."""
        if isinstance(value, str):
            return cls(value.translate(cls.to_twins))
        if isinstance(value, list):
            return [cls.mark(item) for item in value]
        if isinstance(value, dict):
            return {cls.mark(key): cls.mark(item) for key, item in value.items()}
        return value

    @property
    def _plain(self) -> str:
        return str.translate(self, self.from_twins)

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return repr(self._plain).translate(self.to_twins)

    def __hash__(self) -> int:
        return hash(self._plain)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._plain == _plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self._plain < _plain(other)

    def __le__(self, other: str) -> bool:
        return self._plain <= _plain(other)

    def __gt__(self, other: str) -> bool:
        return self._plain > _plain(other)

    def __ge__(self, other: str) -> bool:
        return self._plain >= _plain(other)

    def __int__(self) -> int:
        return int(self._plain)

    def __float__(self) -> float:
        return float(self._plain)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and _plain(item) in self._plain

    def __iter__(self) -> Iterator[str]:
        return map(type(self), str.__iter__(self))

    def __getitem__(self, key: SupportsIndex | slice) -> CallerText:
        return CallerText(str.__getitem__(self, key))

    def __add__(self, other: str) -> CallerText:
        return CallerText(str.__add__(self, other))

    def __radd__(self, other: str) -> CallerText:
        return CallerText(str.__add__(other, self))

    # The rest finds places in the plain text and cuts the marked one there: they are as long.

    def strip(self, chars: str | None = None) -> CallerText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> CallerText:
        return self[len(self) - len(self._plain.lstrip(chars and _plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> CallerText:
        return self[: len(self._plain.rstrip(chars and _plain(chars)))]

    def removeprefix(self, prefix: str, /) -> CallerText:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> CallerText:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        parts = self._plain.split(sep and _plain(sep), maxsplit)
        return self._cut(parts, gap=len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        parts = self._plain.rsplit(sep and _plain(sep), maxsplit)
        return self._cut(parts, gap=len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return self._cut(self._plain.splitlines(keepends))

    def partition(self, sep: str, /) -> tuple[Any, Any, Any]:
        before, middle, after = self._cut(list(self._plain.partition(_plain(sep))))
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[Any, Any, Any]:
        before, middle, after = self._cut(list(self._plain.rpartition(_plain(sep))))
        return before, middle, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> CallerText:  # type: ignore[override, unused-ignore]
        if not old:
            return CallerText(str.replace(self, old, new, count))
        return CallerText(str.join(str(new), self.split(old, count)))

    def _cut(self, plain_parts: list[str], gap: int = 0) -> list[CallerText]:
        """The marked form of parts that lie in this order in the plain text, ``gap`` characters
        apart at least, with nothing but white space beyond that between them."""
        plain, at, parts = self._plain, 0, []
        for part in plain_parts:
            at = plain.index(part, at)
            parts.append(self[at : at + len(part)])
            at += len(part) + gap
        return parts


def _plain(text: str) -> str:
    return str.translate(text, CallerText.from_twins)


def _answers(name: str) -> Callable[..., Any]:
    """A ``str`` method that answers a question about the plain text."""
    method = getattr(str, name)

    def ask(self: CallerText, *args: Any) -> Any:
        wanted = (
            _plain(arg)
            if isinstance(arg, str)
            else tuple(map(_plain, arg))
            if isinstance(arg, tuple)
            else arg
            for arg in args
        )
        return method(self._plain, *wanted)

    return ask


def _recases(name: str) -> Callable[[CallerText], CallerText]:
    """A ``str`` method that changes letters; what comes of the caller's letters is marked."""
    method = getattr(str, name)

    def recase(self: CallerText) -> CallerText:
        changed: str = method(self._plain)
        marked = changed.translate(self.to_twins)
        if len(changed) != len(self):  # "ß".upper(): places no longer correspond
            return CallerText(marked)
        twins = self.from_twins
        return CallerText(
            "".join(
                new_twin if ord(old) in twins else new
                for old, new, new_twin in zip(str.__iter__(self), changed, marked, strict=True)
            )
        )

    return recase


for _name in ("startswith", "endswith", "find", "rfind", "index", "rindex", "count"):
    setattr(CallerText, _name, _answers(_name))
for _name in dir(str):
    if _name.startswith("is"):
        setattr(CallerText, _name, _answers(_name))
for _name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
    setattr(CallerText, _name, _recases(_name))
