"""A team of threads that run one compiled function together, with barriers inside it.

The calling thread is member 0. The others are Python threads that live in compiled code without
the GIL: between steps they spin for a moment, so that the next token finds them awake, then sleep
on a semaphore. A barrier costs a fraction of a microsecond where a parallel region costs several.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np

from headrace.cpu.compile import team_library
from headrace.cpu.layout import TICKET, parked, shared_bytes
from headrace.errors import DeviceError


def default_threads() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Team:
    """The other members, 1 … ``n_threads`` - 1, and what wakes them.

    ``serve(member, ticket)`` is compiled code without the GIL: it runs every step that is started
    and returns the last ticket it saw when none has come for a while, or when told to stop.
    ``shared`` is the address of the counters, for ``sync.py``.
    """

    def __init__(self, n_threads: int, serve: Callable[[int, int, int], int]) -> None:
        self.n_threads = n_threads
        self._buffer = np.zeros(shared_bytes(n_threads) + 64, np.uint8)
        self.shared = -(-self._buffer.ctypes.data // 64) * 64
        library = team_library()
        self._add = library.function("atomic_add", 2)
        self._exchange = library.function("atomic_exchange", 2)
        self._serve = serve
        self._wake = [threading.Semaphore(0) for _ in range(n_threads)]
        self._closed = False
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._live, args=(i,), name=f"headrace-{i}", daemon=True)
            for i in range(1, n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start_step(self) -> None:
        """Let every member run one step. The caller then runs it too, as member 0."""
        if os.getpid() != self._process:
            raise DeviceError(
                "this model was loaded before the process forked and its threads stayed behind: "
                "load the model in the child, or start the child with 'spawn'"
            )
        self._add(self.shared + TICKET, 1)
        self.wake()

    def ticket(self) -> int:
        """How many steps have been started."""
        return self._add(self.shared + TICKET, 0)

    def wake(self) -> None:
        """Wake the members that sleep."""
        for member in range(1, self.n_threads):
            if self._exchange(self.shared + parked(member), 0):
                self._wake[member].release()

    def close(self) -> None:
        """End the threads. Idempotent."""
        if not self._closed:
            self._closed = True
            if os.getpid() == self._process:
                self.start_step()
                for thread in self._threads:
                    thread.join()

    def _live(self, member: int) -> None:
        last = 0
        while True:
            last = self._serve(member, self.shared, last)
            if self._closed:  # set before the ticket that ends us, so never missed
                return
            self._exchange(self.shared + parked(member), 1)
            # Whoever takes the flag down owns the wake-up: a step that began just now either left
            # it for us, or took it and is about to release the semaphore.
            if self.ticket() == last or not self._exchange(self.shared + parked(member), 0):
                self._wake[member].acquire()
