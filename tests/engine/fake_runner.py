"""A runner whose answers show every mistake in the bookkeeping of pages.

Its cache holds, at each position of each page, the token that was run there. The logits of a row
are a fixed function of the tokens that its slot's pages hold up to its position: a page lost,
shared wrongly, not copied, or overwritten changes the text.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from headrace.backend import PAGE_SIZE, Batch, Choice, DecodeRow
from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.engine.sequence import Event
from headrace.engine.sequence import Sequence as EngineSequence
from headrace.model.decoder import Config, Decoder
from headrace.sampling import Sampler, SamplingParams
from headrace.text.tokenizer import Tokenizer

END = 2
N_VOCAB = 3 + 256
GREEDY = SamplingParams(temperature=0)


def byte_tokenizer() -> Tokenizer:
    """<unk> <s> </s>, then one token a byte: id = byte + 3."""
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [
                "<unk>",
                "<s>",
                "</s>",
                *(f"<0x{b:02X}>" for b in range(256)),
            ],
            "tokenizer.ggml.scores": np.zeros(N_VOCAB, np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256, np.int32),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": END,
        }
    )


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def prompt(n: int, seed: int = 0) -> list[int]:
    """``n`` random ids, always the same for a seed."""
    return random.Random(seed).choices(range(3, N_VOCAB), k=n)


def hashed_logits(context: Sequence[int]) -> np.ndarray:
    """Logits float32 [N_VOCAB] from nothing but the tokens so far; never the end token."""
    digest = hashlib.blake2b(np.array(context, np.int64).tobytes(), digest_size=8).digest()
    logits = np.random.default_rng(int.from_bytes(digest)).normal(0, 3, N_VOCAB)
    logits[:3] = -20
    return logits.astype(np.float32)


def scripted(answers: dict[str, str]) -> Callable[[Sequence[int]], np.ndarray]:
    """Logits that make greedy decoding answer each prompt (its text) with a text, then end."""
    paths = {tuple(ids(prompt)): [*ids(answer), END] for prompt, answer in answers.items()}

    def logits(context: Sequence[int]) -> np.ndarray:
        out = np.zeros(N_VOCAB, np.float32)
        for prompt, answer in paths.items():
            n = len(context) - len(prompt)
            if 0 <= n < len(answer) and tuple(context) == (*prompt, *answer[:n]):
                out[answer[n]] = 10
        return out

    return logits


class FakeRunner:
    device_name = "fake"
    prompt_rows = 256

    def __init__(
        self,
        logits: Callable[[Sequence[int]], np.ndarray] = hashed_logits,
        context_length: int = 1 << 20,
    ) -> None:
        config = Config("fake", "fake", 1, 1, 1, 1, 1, 1, N_VOCAB, context_length)
        self.decoder = Decoder(config, (), {})
        self.logits = logits
        self.batches: list[Batch] = []
        self.copies: list[tuple[int, int]] = []
        self.before_step: Callable[[Batch], None] = lambda batch: None
        self.before_copy: Callable[[], None] = lambda: None

    def allocate_cache(self, n_pages: int) -> None:
        self.cache = np.full((n_pages, PAGE_SIZE), -1, np.int64)

    def step(self, batch: Batch) -> np.ndarray:
        self.before_step(batch)
        self.batches.append(batch)
        pages = batch.page_table[batch.slots, batch.positions // PAGE_SIZE]
        offsets = batch.positions % PAGE_SIZE
        assert len({*zip(pages.tolist(), offsets.tolist(), strict=True)}) == len(pages)
        self.cache[pages, offsets] = batch.tokens
        rows = [self._context(batch, row) for row in batch.logit_rows]
        return np.array([self.logits(row) for row in rows], np.float32).reshape(-1, N_VOCAB)

    def _context(self, batch: Batch, row: int) -> list[int]:
        length = int(batch.positions[row]) + 1
        pages = batch.page_table[batch.slots[row], : -(-length // PAGE_SIZE)]
        return self.cache[pages].reshape(-1)[:length].tolist()

    def hidden(self, batch: Batch) -> np.ndarray:
        raise AssertionError("no test of the engine asks for hidden states")

    def copy_page(self, source: int, target: int) -> None:
        self.before_copy()
        self.copies.append((source, target))
        self.cache[target] = self.cache[source]

    def close(self) -> None:
        pass

    @property
    def n_rows(self) -> int:
        return sum(len(batch.tokens) for batch in self.batches)


class FakeDecodingRunner(FakeRunner):
    """Chooses tokens itself, ``AHEAD`` steps before they are asked for, as a device does."""

    AHEAD = 4
    max_burst_rows = 64

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.bursts: list[FakeBurst] = []
        self.before_choice: Callable[[], None] = lambda: None

    def can_sample(self, params: SamplingParams) -> bool:
        return params.top_k != 1  # something it does not do

    def decode(self, rows: Sequence[DecodeRow], n_steps: int) -> FakeBurst:
        self.check_idle()
        for row in rows:
            assert len(row.tokens) - 1 + n_steps <= len(row.pages) * PAGE_SIZE
        self.bursts.append(FakeBurst(self, rows, n_steps))
        return self.bursts[-1]

    def check_idle(self) -> None:
        assert not self.bursts or self.bursts[-1].ended, "other work while a burst runs"

    def step(self, batch: Batch) -> np.ndarray:
        self.check_idle()
        return super().step(batch)


class FakeBurst:
    def __init__(self, runner: FakeDecodingRunner, rows: Sequence[DecodeRow], n_steps: int) -> None:
        self._runner, self._rows, self._left = runner, rows, n_steps
        self.n_rows, self.n_steps = len(rows), 0
        self._tokens = [list(row.tokens) for row in rows]
        self._samplers = [Sampler(row.params) for row in rows]
        for sampler, row in zip(self._samplers, rows, strict=True):
            sampler.seed = row.seed
            for token in row.tokens[row.n_prompt :]:
                sampler.accept(token)
        self._made: deque[list[Choice]] = deque()
        self.ended = False

    def _make(self) -> list[Choice]:
        choices = []
        for row, tokens, sampler in zip(self._rows, self._tokens, self._samplers, strict=True):
            position = len(tokens) - 1
            self._runner.cache[row.pages[position // PAGE_SIZE], position % PAGE_SIZE] = tokens[-1]
            context = self._runner.cache[list(row.pages)].reshape(-1)[: position + 1].tolist()
            logits = self._runner.logits(context)
            choice = Choice(*sampler.sample(logits, tokens[: row.n_prompt]))
            tokens.append(choice.token)
            choices.append(choice)
        return choices

    def __iter__(self) -> FakeBurst:
        return self

    def __next__(self) -> list[Choice]:
        self._runner.before_choice()
        while self._left and len(self._made) < self._runner.AHEAD:
            self._left -= 1
            self._made.append(self._make())
        if not self._made:
            self.ended = True
            raise StopIteration
        self.n_steps += 1
        return self._made.popleft()

    def stop(self) -> None:
        self._left = 0


def make_engine(runner: FakeRunner | None = None, **options: int) -> Engine:
    return Engine(runner or FakeRunner(), TOKENIZER, **{"context": 1024, **options})


def add(engine: Engine, tokens: Sequence[int], **options) -> EngineSequence:
    """Queue a request; its events collect in ``sequence.events``."""
    events: list[Event] = []
    sequence = engine.add(Request(tokens, **{"sampling": GREEDY, **options}), events.append)
    sequence.events = events
    return sequence


def drain(engine: Engine) -> None:
    while engine.step():
        check_pages(engine)


def run(engine: Engine, tokens: Sequence[int], **options) -> EngineSequence:
    sequence = add(engine, tokens, **options)
    drain(engine)
    return sequence


def expected(
    tokens: Sequence[int], n: int, params: SamplingParams = GREEDY, logits=hashed_logits
) -> list[int]:
    """The answer by definition: the whole context anew for each token."""
    sampler = Sampler(params)
    context = list(tokens)
    for _ in range(n):
        context.append(sampler.sample(logits(context), tokens)[0])
    return context[len(tokens) :]


def check_pages(engine: Engine) -> None:
    """Every page is in one state, held exactly as often as sequences hold it."""
    pool = engine.pool
    held = [page for sequence in engine.scheduler.running for page in sequence.pages]
    for page in range(pool.n_pages):
        assert pool.references(page) == held.count(page), page
    assert pool.n_held == len(set(held))
    assert pool.n_free + pool.n_cached + pool.n_held == pool.n_pages
    for sequence in engine.scheduler.running:
        row = engine.scheduler.page_table[sequence.slot, : len(sequence.pages)]
        assert row.tolist() == sequence.pages
    for sequence in engine.scheduler.waiting:
        assert not sequence.pages
    in_order = [*engine.scheduler.running, *engine.scheduler.waiting]
    assert in_order == sorted(in_order, key=lambda sequence: sequence.clock.added)
