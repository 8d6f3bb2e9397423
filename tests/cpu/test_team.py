"""The team of threads: barriers under contention, parking and waking, closing, forking."""

from __future__ import annotations

import os
import random
import threading
import time

import numba as nb
import numpy as np
import pytest

from headrace.cpu.sync import await_ticket, barrier
from headrace.cpu.team import Team, default_threads
from headrace.errors import DeviceError

PHASES = 3


@nb.njit(nogil=True)
def _run(member, shared, n_threads, counts, faults):
    """Each phase counts up, and then must see that every member has, and none has gone on."""
    for _ in range(PHASES):
        counts[member, 0] += 1
        barrier(shared, n_threads)
        for other in range(n_threads):
            if counts[other, 0] != counts[member, 0]:
                faults[member, 0] += 1
        barrier(shared, n_threads)


@nb.njit(nogil=True)
def _serve(member, shared, ticket, n_threads, counts, faults, closing):
    while True:
        newest = await_ticket(shared, ticket)
        if newest == ticket or closing[0]:
            return newest
        if newest != ticket + 1:  # a step that went without this member
            faults[member, 0] += 1
        ticket = newest
        _run(member, shared, n_threads, counts, faults)


class Counting:
    """A team whose steps count. ``returns``: how often a member went to park."""

    def __init__(self, n_threads: int) -> None:
        self.counts = np.zeros((n_threads, 8), np.int64)  # a cache line each
        self.faults = np.zeros((n_threads, 8), np.int64)
        self.closing = np.zeros(1, np.int64)
        self.returns = 0

        def serve(member: int, shared: int, ticket: int) -> int:
            last = _serve(member, shared, ticket, n_threads, self.counts, self.faults, self.closing)
            self.returns += 1
            return int(last)

        # Compiled before the threads start: member 0 returns at once, seeing itself closed.
        self.team = Team(1, serve)
        self.closing[0] = 1
        serve(0, self.team.shared, -1)
        self.closing[0], self.returns = 0, 0
        self.team = Team(n_threads, serve)

    def step(self) -> None:
        self.team.start_step()
        _run(0, self.team.shared, self.team.n_threads, self.counts, self.faults)

    def close(self) -> None:
        """Close, or fail after a while instead of hanging."""
        self.closing[0] = 1
        closer = threading.Thread(target=self.team.close, daemon=True)
        closer.start()
        closer.join(20)
        assert not closer.is_alive(), "Team.close hangs"


@pytest.mark.parametrize("n_threads", [1, 2, 4 * default_threads()])
def test_members_wait_for_each_other_however_long_a_step_is_in_coming(n_threads):
    team = Counting(n_threads)
    chance = random.Random(n_threads)
    for _ in range(2000):
        what = chance.random()
        if what < 0.02:
            time.sleep(0.02)  # all park
        elif what < 0.2:
            time.sleep(chance.uniform(0, 1e-3))  # some park, some are about to
        team.step()
    team.close()
    assert not team.faults.any()
    assert (team.counts[:, 0] == 2000 * PHASES).all()
    if n_threads > 1:
        assert team.returns > 2000 * 0.02, "the members never parked"


@pytest.mark.parametrize("state", ["new", "parked", "spinning", "about to park"])
def test_close_from_every_state(state):
    chance = random.Random(1)
    for _ in range(100):
        team = Counting(3)
        if state != "new":
            team.step()
        if state == "parked":
            time.sleep(0.004)
        if state == "about to park":
            time.sleep(chance.uniform(0, 1e-3))
        team.close()
        assert not team.faults.any()
        assert not any(t.is_alive() for t in team.team._threads)


def test_close_twice():
    team = Counting(2)
    team.close()
    team.close()


def test_teams_beside_each_other():
    teams = [Counting(2) for _ in range(3)]
    for _ in range(50):
        for team in teams:
            team.step()
    for team in teams:
        team.close()
        assert not team.faults.any()
        assert (team.counts[:, 0] == 50 * PHASES).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_forked_child_is_told_and_the_parent_goes_on(n_threads):
    team = Counting(n_threads)
    team.step()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            team.team.start_step()
        except DeviceError as error:
            code = 0 if "fork" in str(error) else 2
        team.team.close()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    team.step()
    team.close()
    assert (team.counts[:, 0] == 2 * PHASES).all()


def test_default_threads_respects_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert default_threads() == 3
