"""Bookkeeping of KV pages: who holds each, which can be shared, which may be overwritten.

Every page is in exactly one state, and the counts always add up to ``n_pages``:

    held     by one or more sequences (reference-counted)
    cached   by none, but what it holds is known and worth keeping; overwritten least recently used
    free     by none, and nothing is known of it

What a page holds depends on the tokens before it too, so a page is known by its *prefix*, a hash
of every token up to its first position, and by its own tokens. A full page is shared as it is; of a
page that agrees only in part, a copy is continued (the caller makes it). Device memory never
appears here: pages are numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.backend import PAGE_SIZE
from headrace.errors import DeviceMemoryError

ROOT = b""
"""The prefix of a sequence's first page."""


def extend_prefix(prefix: bytes, tokens: Sequence[int]) -> bytes:
    """The prefix after a page of ``tokens``: 16 bytes of BLAKE2b, so that collisions never happen,
    even when prompts are written to cause them."""
    return hashlib.blake2b(prefix + array("i", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Match:
    """What of a prompt is known: whole shared pages, then part of one more page.

    pages: held for the caller, who releases them. prefix: of the position after them.
    partial: a page whose first ``n_partial`` tokens agree, held too when not None: copy, then
    release it.
    """

    pages: list[int]
    prefix: bytes
    partial: int | None
    n_partial: int


@dataclass(frozen=True)
class _Content:
    prefix: bytes
    tokens: tuple[int, ...]


class PagePool:
    """``n_pages`` pages, all free at first. Not thread-safe: the engine's lock covers it."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        # Taken from the end, lowest number first: memory of high pages is touched only if needed.
        self._free = list(range(n_pages - 1, -1, -1))
        self._references = [0] * n_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._contents: dict[int, _Content] = {}
        self._pages_after: dict[bytes, dict[tuple[int, ...], int]] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_cached(self) -> int:
        return len(self._cached)

    @property
    def n_held(self) -> int:
        return self.n_pages - self.n_free - self.n_cached

    @property
    def n_available(self) -> int:
        """Pages that :meth:`allocate` can hand out now."""
        return self.n_free + self.n_cached

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self) -> int:
        """A page of unknown content, held once; forgets the least recently used one if need be."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        else:
            raise DeviceMemoryError(
                f"all {self.n_pages} KV pages ({self.n_pages * PAGE_SIZE} positions) are in use: "
                "wait for a request to end, or load with a larger context"
            )
        self._references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more reference to a held or cached page."""
        self._cached.pop(page, None)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One reference less; the last one leaves the page cached if its content is known."""
        if self._references[page] == 0:
            raise ValueError(f"page {page} is not held")
        self._references[page] -= 1
        if self._references[page] == 0:
            if page in self._contents:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, prefix: bytes, tokens: Sequence[int]) -> None:
        """Make known that ``page`` (held, and not written again below ``len(tokens)``) holds
        ``tokens`` after ``prefix``. The first page to hold the same is the one that is shared."""
        content = _Content(prefix, tuple(tokens))
        siblings = self._pages_after.setdefault(prefix, {})
        if content.tokens not in siblings and page not in self._contents:
            siblings[content.tokens] = page
            self._contents[page] = content

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest known beginning of ``tokens``; the pages are held for the caller."""
        pages: list[int] = []
        prefix = ROOT
        for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            own = tuple(tokens[start : start + PAGE_SIZE])
            page = self._pages_after.get(prefix, {}).get(own)
            if page is None:
                break
            self.hold(page)
            pages.append(page)
            prefix = extend_prefix(prefix, own)
        partial, n_partial = self._longest_partial(prefix, tokens[len(pages) * PAGE_SIZE :])
        if partial is not None:
            self.hold(partial)
        return Match(pages, prefix, partial, n_partial)

    def _longest_partial(self, prefix: bytes, tokens: Sequence[int]) -> tuple[int | None, int]:
        best, n_best = None, 0
        for known, page in self._pages_after.get(prefix, {}).items():
            n = _common_length(known, tokens)
            if n > n_best:
                best, n_best = page, n
        return best, n_best

    def _forget(self, page: int) -> None:
        content = self._contents.pop(page)
        siblings = self._pages_after[content.prefix]
        del siblings[content.tokens]
        if not siblings:
            del self._pages_after[content.prefix]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
