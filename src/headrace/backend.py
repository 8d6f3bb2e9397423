"""The small protocol that the three backends (reference, cpu, cuda) offer.

A step takes rows. A row is one token of one sequence: (token id, position, slot). A prompt chunk is
T rows of one slot, a decode step one row, a continuous batch one row from each of many slots: the
same step with different rows. Keys and values live in pages; ``page_table`` maps a slot's
positions to pages, and the engine owns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headrace.model.decoder import Decoder
from headrace.sampling import SamplingParams, TokenLogprob

PAGE_SIZE = 64
"""Positions in one KV page."""

CACHED_BYTES = {"f16": 2.0, "q8_0": 1.0 + 2 / 32}
"""What keys and values may be kept as, and the bytes of one: int8, and an f16 scale for 32."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    tokens, positions, slots: int32 [T]. Rows of a slot appear in ascending, consecutive positions,
    and every earlier position of that slot is already in the cache. Position ``p`` of slot ``s``
    lives in page ``page_table[s, p // PAGE_SIZE]`` at offset ``p % PAGE_SIZE``.
    page_table: int32 [n_slots, max_pages]; entries beyond a slot's length are ignored.
    logit_rows: int32 [R], the rows whose logits are wanted, ascending.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    page_table: NDArray[np.int32]
    logit_rows: NDArray[np.int32]


class Runner(Protocol):
    """A decoder loaded on a device, with its KV cache."""

    decoder: Decoder

    @property
    def device_name(self) -> str: ...

    @property
    def prompt_rows(self) -> int:
        """Rows of prompts that run best together in one step."""

    def allocate_cache(self, n_pages: int) -> None:
        """Make room for ``n_pages`` pages of every layer, dropping what was cached.

        Raises DeviceMemoryError with the bytes wanted and free.
        """

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run all operations over the rows; returns logits float32 [R, n_vocab] (a fresh array).

        Keys and values of every row are written to the cache.
        """

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """As :meth:`step`, but returns the final normed hidden states float32 [R, d_model]."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of every layer (a shared page is copied before it is written)."""

    def close(self) -> None:
        """Release the device memory. Idempotent."""


@dataclass(frozen=True)
class DecodeRow:
    """A sequence whose next tokens a device makes and chooses by itself.

    tokens: prompt and answer so far; all but the last are in the cache. pages: position ``p`` lives
    in ``pages[p // PAGE_SIZE]``; as many as the tokens to come need. n_prompt: the prompt's tokens.
    """

    tokens: Sequence[int]
    pages: Sequence[int]
    n_prompt: int
    params: SamplingParams
    seed: int


class Choice(NamedTuple):
    """The token chosen for a row, and its log-probabilities where the row asks for them."""

    token: int
    logprob: TokenLogprob | None


class Burst(Protocol):
    """Steps under way on the device: each ``next`` is one step's choices, one for each row.

    The device runs ahead of the host. :meth:`stop` starts no further step; those under way still
    come. Whatever a row's sequence has no use for may be ignored.
    """

    def __iter__(self) -> Iterator[list[Choice]]: ...

    def __next__(self) -> list[Choice]: ...

    def stop(self) -> None: ...


@runtime_checkable
class DecodingRunner(Protocol):
    """A runner that can also choose tokens, with ``headrace.sampling``'s results."""

    @property
    def max_burst_rows(self) -> int: ...

    def can_sample(self, params: SamplingParams) -> bool: ...

    def decode(self, rows: Sequence[DecodeRow], n_steps: int) -> Burst:
        """Start ``n_steps`` steps of one token of each row.

        Nothing else may run on the runner until the burst has ended. Raises ContextOverflowError
        when the pages of a row do not hold them.
        """
