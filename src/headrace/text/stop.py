"""Stop strings in a stream of text, by an Aho-Corasick automaton.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975): one step a
character whatever the number of stop strings, and its state is exactly the longest tail of the
text that could still become one: what must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from headrace.errors import RequestError


class StopStrings:
    """Passes text on up to the first stop string, of which no character is ever shown.

    The stream ends at the first character that completes a stop string, and the text shown ends
    where the longest stop string completed there begins. So the result does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError for an empty stop string."""
        self.matched: str | None = None
        """The stop string that ended the stream."""
        self._held = ""  # the text the automaton's state stands for
        self._state = 0
        self._automaton = _automaton(tuple(stops))

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown now; "" once a stop string has matched."""
        if self.matched is not None:
            return ""
        automaton = self._automaton
        held = self._held + text
        for at, char in enumerate(text, len(self._held) + 1):
            self._state = automaton.step(self._state, char)
            if (stop := automaton.complete[self._state]) is not None:
                self.matched = stop
                self._held = ""
                return held[: at - len(stop)]
        shown = len(held) - automaton.depth[self._state]
        self._held = held[shown:]
        return held[:shown]

    def flush(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """States are numbers; 0 is the beginning. ``depth`` is the length of the text a state stands
    for, ``complete`` the longest stop string that ends in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.complete: list[str | None] = [None]
        for stop in stops:
            if not stop:
                raise RequestError("stop: a stop string must not be empty")
            self._add(stop)
        self.depth = [0] * len(self._next)
        self._link()

    def step(self, state: int, char: str) -> int:
        while char not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][char]

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._next[state].setdefault(char, len(self._next))
            if following == len(self._next):
                self._next.append({})
                self._fallback.append(0)
                self.complete.append(None)
            state = following
        self.complete[state] = stop

    def _link(self) -> None:
        """Point each state to that of its longest proper tail, breadth first."""
        queue = [0]
        for state in queue:  # grows as it is read
            for char, following in self._next[state].items():
                self.depth[following] = self.depth[state] + 1
                if state:
                    tail = self.step(self._fallback[state], char)
                    self._fallback[following] = tail
                    if self.complete[following] is None:
                        self.complete[following] = self.complete[tail]
                queue.append(following)


# The choices of a request have the same stop strings, and most requests those of the one before.
_automaton = lru_cache(maxsize=4)(_Automaton)
