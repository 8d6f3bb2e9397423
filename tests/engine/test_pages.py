"""Page accounting: any order of operations leaves every page in exactly one state."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_runner import FakeRunner, add, check_pages, expected, make_engine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.backend import PAGE_SIZE
from headrace.engine.pages import ROOT, PagePool, extend_prefix
from headrace.errors import DeviceMemoryError
from headrace.sampling import SamplingParams

QUICK = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the plainest model of it: who holds what, and what each page was said to hold.

    Contents are short tuples of two letters: the pool does not mind that they fill no page, and so
    equal ones come up often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.holds: Counter[int] = Counter()
        self.known: dict[int, tuple[int, ...]] = {}
        self.order: list[int] = []  # of release

    @rule()
    def allocate(self) -> None:
        was_cached = {p for p in self.known if not self.holds[p]}
        if sum(1 for p in range(6) if self.holds[p]) == 6:
            with pytest.raises(DeviceMemoryError, match="all 6 KV pages"):
                self.pool.allocate()
            return
        n_free = self.pool.n_free
        page = self.pool.allocate()
        assert not self.holds[page]
        if n_free:
            assert page not in self.known
        else:  # the one released longest ago
            assert page == next(p for p in self.order if p in was_cached)
        self.known.pop(page, None)
        self.holds[page] += 1

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(p for p in self.holds if self.holds[p])))
        self.pool.release(page)
        self.holds[page] -= 1
        if not self.holds[page]:
            self.order = [p for p in self.order if p != page] + [page]

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple))
    def publish(self, data: st.DataObject, tokens: tuple[int, ...]) -> None:
        page = data.draw(st.sampled_from(sorted(p for p in self.holds if self.holds[p])))
        self.pool.publish(page, ROOT, tokens)
        if page not in self.known and tokens not in self.known.values():
            self.known[page] = tokens

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple))
    def match(self, tokens: tuple[int, ...]) -> None:
        def common(known: tuple[int, ...]) -> int:
            n = 0
            while n < min(len(known), len(tokens)) and known[n] == tokens[n]:
                n += 1
            return n

        match = self.pool.match(tokens)
        assert match.pages == []
        best = max((common(known) for known in self.known.values()), default=0)
        assert match.n_partial == best
        if match.partial is not None:
            assert common(self.known[match.partial]) == best
            self.holds[match.partial] += 1

    @invariant()
    def every_page_is_in_one_state(self) -> None:
        for page in range(6):
            assert self.pool.references(page) == self.holds[page]
        n_held = sum(1 for page in range(6) if self.holds[page])
        n_cached = sum(1 for page in self.known if not self.holds[page])
        assert (self.pool.n_held, self.pool.n_cached) == (n_held, n_cached)
        assert self.pool.n_free == 6 - n_held - n_cached


class EngineMachine(RuleBasedStateMachine):
    """Requests added, stepped and cancelled in any order over few pages, with common prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(
            FakeRunner(), context=4 * PAGE_SIZE, n_pages=7, max_sequences=3, chunk=60
        )
        self.asked: list[tuple] = []

    @rule(
        n=st.integers(1, 150),
        other=st.integers(0, 200),
        max_tokens=st.integers(1, 90),
        seed=st.integers(0, 2),
    )
    def add(self, n: int, other: int, max_tokens: int, seed: int) -> None:
        tokens = [3 + (i * 7 if i < other else i * 5) % 250 for i in range(n)]
        params = SamplingParams(seed=seed)
        sequence = add(self.engine, tokens, max_tokens=max_tokens, sampling=params)
        self.asked.append((sequence, tokens, max_tokens, params))

    @rule(n=st.integers(1, 80))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.asked))[0])

    @invariant()
    def pages_add_up(self) -> None:
        check_pages(self.engine)

    def teardown(self) -> None:
        while self.engine.step():
            check_pages(self.engine)
        assert self.engine.pool.n_held == 0
        for sequence, tokens, max_tokens, params in self.asked:
            want = expected(tokens, max_tokens, params)
            if sequence.finish_reason == "cancelled":
                want = want[: sequence.n_generated]
            assert sequence.generated == want


TestPool = PoolMachine.TestCase
TestPool.settings = settings(QUICK, max_examples=150)
TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(QUICK, stateful_step_count=15)


def test_full_pages_are_shared_and_counted() -> None:
    pool = PagePool(4)
    tokens = list(range(2 * PAGE_SIZE))
    pages = [pool.allocate(), pool.allocate()]
    pool.publish(pages[0], ROOT, tokens[:PAGE_SIZE])
    prefix = extend_prefix(ROOT, tokens[:PAGE_SIZE])
    pool.publish(pages[1], prefix, tokens[PAGE_SIZE:])
    match = pool.match([*tokens, 1])
    assert (match.pages, match.partial) == (pages, None)
    assert match.prefix == extend_prefix(prefix, tokens[PAGE_SIZE:])
    assert [pool.references(page) for page in pages] == [2, 2]
    # The same page after another beginning is another page.
    assert pool.match(tokens[PAGE_SIZE:]).pages == []


def test_a_page_is_known_by_all_that_comes_before_it() -> None:
    pool = PagePool(5)
    a, b, x, y = ([i] * PAGE_SIZE for i in range(4))
    for pages in ([a, x, y], [b, x]):
        prefix = ROOT
        for tokens in pages:
            pool.publish(pool.allocate(), prefix, tokens)
            prefix = extend_prefix(prefix, tokens)
    assert pool.match([*b, *x, *y]).pages == [3, 4]


def test_releasing_what_is_not_held_is_an_error() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(ValueError, match="page 0 is not held"):
        pool.release(page)
