"""Stop strings in a stream of text, by an Aho-Corasick automaton.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975): one step a
character whatever the number of stop strings, and its state is exactly the longest tail of the
text that could still become one: what must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._complete: list[str | None] = [None]  # longest stop string that ends in this state
        for stop in stops:
            if not stop:
                raise RequestError("stop: a stop string must not be empty")
            self._add(stop)
        self._link()

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown now; "" once a stop string has matched."""
        if self.matched is not None:
            return ""
        held = self._held + text
        shown = 0
        for at, char in enumerate(text, len(self._held) + 1):
            state = self._step(self._state, char)
            self._state = state
            if (stop := self._complete[state]) is not None:
                self.matched = stop
                self._held = ""
                return held[: at - len(stop)]
        shown = len(held) - self._depth[self._state]
        self._held = held[shown:]
        return held[:shown]

    def flush(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
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
                self._complete.append(None)
            state = following
        self._complete[state] = stop

    def _link(self) -> None:
        """Point each state to that of its longest proper tail, breadth first."""
        self._depth = [0] * len(self._next)
        queue = [0]
        for state in queue:  # grows as it is read
            for char, following in self._next[state].items():
                self._depth[following] = self._depth[state] + 1
                if state:
                    tail = self._step(self._fallback[state], char)
                    self._fallback[following] = tail
                    if self._complete[following] is None:
                        self._complete[following] = self._complete[tail]
                queue.append(following)
