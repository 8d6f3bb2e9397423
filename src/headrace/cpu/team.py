"""A team of threads that run one compiled function together, with barriers inside it.

The calling thread is member 0. The others are Python threads that live in compiled code without
the GIL: between steps they spin for a moment, so that the next token finds them awake, then sleep
on a semaphore. A barrier costs a fraction of a microsecond where a parallel region costs several.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numba as nb
import numpy as np

from headrace.cpu.intrinsics import atomic_add, atomic_exchange, atomic_load, sched_yield
from headrace.errors import DeviceError

_LINE = 64
"""Bytes of a cache line: each shared counter has its own."""

ARRIVED, GENERATION, TICKET = 0, _LINE, 2 * _LINE
"""Offsets of the barrier's counters and of the number of steps started."""
_PARKED = 3 * _LINE
"""Offset of the members' flags: 1 while one sleeps or is about to."""

_SPINS_BEFORE_YIELD = 2_000
_SPINS_BEFORE_SLEEP = 40_000


@nb.njit(cache=True, nogil=True)
def barrier(shared, n_threads):
    """Wait until all members have arrived."""
    if n_threads == 1:
        return
    generation = atomic_load(shared + GENERATION)
    if atomic_add(shared + ARRIVED, 1) == n_threads - 1:
        atomic_exchange(shared + ARRIVED, 0)
        atomic_add(shared + GENERATION, 1)
        return
    spins = 0
    while atomic_load(shared + GENERATION) == generation:
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:  # more threads than free cores: let the late one run
            sched_yield()


@nb.njit(cache=True, nogil=True)
def await_ticket(shared, last):
    """Spin for a while until a step after ``last`` is started; returns the newest ticket."""
    for _ in range(_SPINS_BEFORE_SLEEP):
        ticket = atomic_load(shared + TICKET)
        if ticket != last:
            return ticket
    return last


@nb.njit(nb.int64(nb.int64), cache=True, nogil=True)
def _load(address):
    return atomic_load(address)


@nb.njit(nb.int64(nb.int64, nb.int64), cache=True, nogil=True)
def _add(address, value):
    return atomic_add(address, value)


@nb.njit(nb.int64(nb.int64, nb.int64), cache=True, nogil=True)
def _exchange(address, value):
    return atomic_exchange(address, value)


def default_threads() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Team:
    """The other members, 1 … ``n_threads`` - 1, and what wakes them.

    ``serve(member, ticket)`` is compiled code without the GIL: it runs every step that is started
    and returns the last ticket it saw when none has come for a while, or when told to stop.
    ``shared`` is the address of the counters, for :func:`barrier` and :func:`await_ticket`.
    """

    def __init__(self, n_threads: int, serve: Callable[[int, int, int], int]) -> None:
        self.n_threads = n_threads
        self._buffer = np.zeros(_PARKED + (n_threads + 1) * _LINE, np.uint8)
        self.shared = -(-self._buffer.ctypes.data // _LINE) * _LINE
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
        _add(self.shared + TICKET, 1)
        for member in range(1, self.n_threads):
            if _exchange(self._parked(member), 0):
                self._wake[member].release()

    def close(self) -> None:
        """End the threads. Idempotent."""
        if not self._closed:
            self._closed = True
            if os.getpid() == self._process:
                self.start_step()
                for thread in self._threads:
                    thread.join()

    def _parked(self, member: int) -> int:
        return self.shared + _PARKED + member * _LINE

    def _live(self, member: int) -> None:
        last = 0
        while True:
            last = self._serve(member, self.shared, last)
            if self._closed:  # set before the ticket that ends us, so never missed
                return
            _exchange(self._parked(member), 1)
            # Whoever takes the flag down owns the wake-up: a step that began just now either left
            # it for us, or took it and is about to release the semaphore.
            if _load(self.shared + TICKET) == last or not _exchange(self._parked(member), 0):
                self._wake[member].acquire()
