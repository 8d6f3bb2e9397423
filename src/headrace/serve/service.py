"""What every route needs, in one place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

from headrace.api import Model
from headrace.engine.request import Request
from headrace.errors import ContextOverflowError, HeadraceError
from headrace.sampling import LogitsMask
from headrace.serve.constrain import Grammars
from headrace.serve.engine_thread import EngineThread
from headrace.serve.exchange import Exchange
from headrace.serve.generation import Generation
from headrace.serve.metrics import Metrics
from headrace.serve.problems import Problem, from_error
from headrace.serve.settings import Settings

T = TypeVar("T")


class Service:
    """The model behind its engine thread, and what goes with it. Belongs to one event loop."""

    def __init__(self, settings: Settings, load: Callable[[], Model]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        capacity = settings.max_sequences + settings.max_waiting
        self.grammars = Grammars()

        def load_all() -> Model:
            model = load()
            self.grammars.prepare(model.tokenizer)
            return model

        self.engine = EngineThread(load_all, capacity, self.metrics)
        self.exchanges: set[Exchange] = set()
        self.created = int(time.time())
        self.metrics.watch(lambda: self.engine.engine, lambda: self.engine.in_flight)
        # Tokenising and templates, off the loop. More threads would only take turns.
        self._text_threads = ThreadPoolExecutor(2, "headrace-text")

    @property
    def model(self) -> Model:
        """The model; raises a 503 while there is none."""
        return self.engine.model

    def check_model(self, name: str | None) -> None:
        """A 404 unless ``name`` is the model served, or not given."""
        if name is not None and name != self.settings.served_name:
            raise Problem(
                404,
                f"the model {name[:200]!r} is not served here; {self.settings.served_name!r} is",
                param="model",
                code="model_not_found",
            )

    def generate(self, requests: Sequence[Request], param: str) -> Generation:
        """Start ``requests``, within the settings' limits; ``param`` is where the prompt came."""
        return Generation(self.engine, requests, param, self.settings.request_timeout)

    async def text(self, param: str, function: Callable[[Model], T]) -> T:
        """``function`` of the model, in a thread for text. Its errors are about ``param``."""
        model = self.model
        try:
            return await self.in_thread(lambda: function(model))
        except HeadraceError as error:
            raise from_error(error, param) from error

    async def in_thread(self, function: Callable[[], T]) -> T:
        """``function()``, in a thread for text."""
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, function)

    async def mask(self, grammar: str | None, param: str) -> LogitsMask | None:
        """A fresh mask for one completion under ``grammar``, if there is one."""
        if grammar is None:
            return None
        model = self.model
        return await self.grammars.mask(grammar, model.config.n_vocab, param)

    def check_length(self, n: int) -> None:
        """ContextOverflowError for ``n`` characters that cannot fit the context, however they are
        tokenised."""
        context = self.model.context
        if n > self._longest_token * context:
            raise ContextOverflowError(
                f"a text of {n} characters does not fit the context of {context} tokens"
            )

    def tokenise(self, model: Model, texts: Iterable[str | Sequence[int]]) -> list[list[int]]:
        """Token ids of each text, BOS first if the model asks for it; ids stay as they are."""
        ids = []
        for text in texts:
            if isinstance(text, str):
                self.check_length(len(text))
                text = model.tokenize(text, bos=True)
            elif len(text) > model.context:
                raise ContextOverflowError(
                    f"a prompt of {len(text)} tokens does not fit the context of {model.context}"
                )
            ids.append(list(text))
        return ids

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the vocabulary's longest token: no token covers more characters than that."""
        tokenizer = self.model.tokenizer
        return max(len(tokenizer.token_text(i).encode()) for i in range(tokenizer.n_vocab))

    def end_all(self, problem: Problem) -> None:
        """End every request that is being answered."""
        for exchange in list(self.exchanges):
            exchange.end(problem)

    async def close(self) -> None:
        await self.engine.close()
        self.grammars.close()
        self._text_threads.shutdown(wait=False, cancel_futures=True)
