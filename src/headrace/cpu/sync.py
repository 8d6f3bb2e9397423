"""The compiled side of a team (``team.py``): the barrier, and waiting for the next step."""

from __future__ import annotations

from headrace.cpu.intrinsics import atomic_add, atomic_exchange, atomic_load, pause, sched_yield
from headrace.cpu.layout import ARRIVED, GENERATION, TICKET
from headrace.cpu.ops import compiled

_SPINS_BEFORE_YIELD = 500
_SPINS_BEFORE_SLEEP = 5_000


@compiled
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
        pause()
        if spins > _SPINS_BEFORE_YIELD:  # more threads than free cores: let the late one run
            sched_yield()


@compiled
def await_ticket(shared, last):
    """Spin for a while until a step after ``last`` is started; returns the newest ticket."""
    for _ in range(_SPINS_BEFORE_SLEEP):
        ticket = atomic_load(shared + TICKET)
        if ticket != last:
            return ticket
        pause()
    return last
