"""The resident executor: a decoder's weights and cache on a device, its operations one by one.

Every method queues kernels on the device's one stream and returns at once: nothing waits but
:meth:`Executor.download` and :meth:`Executor.synchronise`. What a method returns is an array of the
executor's own, on the device, and holds until the method is called again. docs/executor.md has the
table of what can be asked, and ``examples/executor.py`` asks it.

:class:`headrace.cuda.runner.CUDARunner` is the whole model over an executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.backend import CACHED_BYTES, Batch
from headrace.cuda import arguments as c
from headrace.cuda import launchers
from headrace.cuda.cache import Cache
from headrace.cuda.device import Counters, Device, DeviceArray, Launch
from headrace.cuda.given import FLOAT, FeedForwardIndex, Given
from headrace.cuda.lowering import Lowering
from headrace.cuda.skinny import MOST_ROWS
from headrace.cuda.stamps import Stamps, parts_of
from headrace.cuda.steps import Step
from headrace.cuda.tuning import Tuning, tuning_for
from headrace.cuda.weights import WeightIndex
from headrace.errors import DeviceError, ModelError
from headrace.instrument import Formats, Part, Span
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Activation,
    Attend,
    FeedForwardIn,
    FeedForwardOut,
    Operation,
    ProjectOut,
    ProjectQKV,
)

_INT8_BYTES = 1.5
"""An int8, and its sixteenth of the eight bytes that go with sixteen."""

_MOST_KERNELS = 16
"""Of one layer."""

T = TypeVar("T", bound=Operation)


@dataclass(frozen=True)
class Ran:
    """A kernel that was launched: its name, its constants, and its shape."""

    kernel: str
    constants: dict[str, str]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


class Executor:
    """``device``: the first GPU unless given. ``max_rows``: the most rows of one call.
    ``float_activations``: matmuls read float32 activations unless a call says otherwise; else int8
    ones. ``tensor_rows``: steps of at least so many rows run on tensor cores, from bfloat16
    activations, where one read of the weights serves all rows; None: none do. ``few_rows``: so do
    steps of so many rows (2 to 16), through a kernel made for them, if all matrices are quantised.
    ``prompt_rows``: up to so many rows of prompts run together through kernels made for them,
    likewise on tensor cores; 0: like any rows. All three need sm_80. ``cache_type``: of keys and
    values, f16 or q8_0.
    ``one_kernel``: all layers of a step of one row are one launch where they can be
    (:func:`token.token_shape`), with int8 activations and an f16 cache; :attr:`ran` says whether
    they were. Not faster yet: docs/decisions/017.
    ``tuning``: constants of the kernels; None: those recorded for the device, or the defaults
    (:func:`tuning.tuning_for`). ``few_rows``, ``tensor_rows`` and ``prompt_rows`` are given apart;
    :func:`runner.best_options` takes them from it.
    ``weights``: of this decoder, loaded on this device, for several executors to share; they and
    the device are their owner's to close.
    ``progress``: is told the bytes of each piece of weights as it is loaded.

    Raises DeviceError if there is no usable device, DeviceMemoryError if the model does not fit,
    ModelError for a missing weight or one of the wrong shape.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: Device | None = None,
        *,
        max_rows: int = 64,
        float_activations: bool = False,
        tensor_rows: int | None = None,
        few_rows: range = range(0),
        prompt_rows: int = 0,
        cache_type: str = "f16",
        one_kernel: bool = False,
        tuning: Tuning | None = None,
        weights: WeightIndex | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if device is None:
            from headrace.cuda.gpu import CUDADevice

            device = CUDADevice()
        if (tensor_rows is not None or few_rows or prompt_rows) and float_activations:
            raise DeviceError("tensor cores take bfloat16 activations: not float_activations too")
        if prompt_rows < 0:
            raise DeviceError(f"prompt_rows {prompt_rows}: 0 or more expected")
        if few_rows and not 2 <= min(few_rows) <= max(few_rows) <= MOST_ROWS:
            raise DeviceError(f"few_rows {few_rows}: within 2 to {MOST_ROWS} expected")
        self.decoder, self.device, self.max_rows = decoder, device, max_rows
        self.cache_type = cache_type
        self.weights, self._shared = weights or WeightIndex(decoder), weights is not None
        self.lowering = Lowering(
            decoder, device, self.weights, max_rows,
            floats=float_activations, tensor_rows=tensor_rows, few_rows=few_rows,
            prompt_rows=prompt_rows, cache_type=cache_type, one_kernel=one_kernel,
            tuning=tuning or tuning_for(device),
        )  # fmt: skip
        self.cache: Cache | None = None
        self.ticket = 0
        """Counts the batches brought: whoever brought the last one owns the inputs."""
        self._layers = _by_layer(decoder)
        self._given = Given(self.lowering)
        self.batch: Batch | None = None
        """The rows brought last."""
        self._stamps: Stamps | None = None
        self._ran: list[Launch] = []
        self._closed = False
        try:
            if not self._shared:
                self.weights.load(device, progress)
            self.lowering.allocate()
            self.index = {i: self._indexed(i) for i in self._layers}
        except BaseException:
            self.close()
            raise

    # Memory

    def allocate_cache(self, n_pages: int) -> None:
        """Make room for ``n_pages`` pages of every layer, dropping what was cached."""
        self.drop_cache()
        self.cache = Cache(
            self.device, self.lowering.cache_shapes, self.lowering.most_rows, n_pages
        )
        self.lowering.use_cache(self.cache.inputs, self.cache.layers)

    def drop_cache(self) -> None:
        self.ticket += 1
        self.batch = None
        if self.cache is not None:
            self.device.synchronise()
            self.cache.close()
        self.cache = None
        self.lowering.use_cache(None, {})

    def require_cache(self) -> Cache:
        if self.cache is None:
            raise DeviceError("there is no KV cache yet: call allocate_cache first")
        return self.cache

    def memory_plan(self) -> list[tuple[str, int]]:
        """(what, bytes) of all it holds on the device."""
        plan = [("weights", self.weights.n_bytes), *self.lowering.arena.plan()]
        return plan + (self.cache.plan() if self.cache else [])

    def upload(self, values: NDArray[np.float32]) -> DeviceArray:
        """Rows float32 [rows, width ≤ the widest] to the executor's place for input."""
        if values.ndim != 2 or not 0 < len(values) <= self.max_rows:
            raise DeviceError(
                f"rows of shape {values.shape}: [1 … {self.max_rows}, width] expected"
            )
        whole = self.lowering.arena["given rows"]
        if values.shape[1] > whole.shape[1]:
            raise DeviceError(
                f"rows of {values.shape[1]} values: at most {whole.shape[1]} expected"
            )
        self.device.upload(whole.address, np.ascontiguousarray(values, np.float32))
        return DeviceArray(whole.address, values.shape, whole.dtype)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Wait for what is queued, and bring an array to the host."""
        return self.device.download(array)

    def synchronise(self) -> None:
        """Wait for all that is queued."""
        self.device.synchronise()

    @property
    def counters(self) -> Counters:
        """Launches, synchronisations and bytes moved either way, since the start."""
        return self.device.counters

    @property
    def ran(self) -> list[Ran]:
        """The kernels that the last call launched."""
        return [
            Ran(x.spec.name, dict(x.spec.macros), x.grid, x.threads, x.shared_bytes)
            for x in self._ran
        ]

    def close(self) -> None:
        """Release the device memory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.drop_cache()
        if self._stamps is not None:
            self._stamps.close()
        self.lowering.arena.free(self.device)
        if not self._shared:
            self.weights.close(self.device)
            self.device.close()

    @property
    def formats(self) -> Formats:
        """Bytes of an activation as a matmul of one row reads it, and of a cached value."""
        cached = CACHED_BYTES[self.cache_type]
        if self.lowering.tensor_rows == 1:
            return Formats(quantised=2.0, cached=cached)
        return Formats(quantised=None if self.lowering.floats else _INT8_BYTES, cached=cached)

    # Rows

    def bring(self, batch: Batch, n_columns: int | None = None) -> int:
        """The rows that attention, cache writes and whole layers are about; returns a ticket."""
        self.require_cache().bring(batch, self.decoder.config.n_vocab, n_columns)
        self.batch = batch
        self.ticket += 1
        return self.ticket

    def run(self, launches: Sequence[Launch]) -> None:
        """Queue kernels, compiling those that are new."""
        self.device.prepare(launch.spec for launch in launches)
        for launch in launches:
            self.device.launch(launch)
        self._ran = list(launches)

    def _step(self) -> Step:
        if self.batch is None:
            raise DeviceError("no rows yet: call bring with their positions and pages first")
        longest = 1 << int(self.batch.positions.max()).bit_length()
        return Step(len(self.batch.tokens), longest, ())

    # The operations

    def matvec(
        self, x: DeviceArray, name: str, *, float_activations: bool | None = None
    ) -> DeviceArray:
        """``W x`` for the matrix of that GGML name. x float32 [rows, k] -> float32 [rows, n]."""
        matrix = self.weights.matrix(name)
        launches, y = self._given.product([matrix], x, self._floats(float_activations))
        self.run(launches)
        return y

    def feed_forward_by_name(
        self,
        x: DeviceArray,
        gate: str,
        up: str,
        down: str,
        *,
        activation: Activation = Activation.SILU,
        float_activations: bool | None = None,
    ) -> DeviceArray:
        """``down(act(gate·x) * (up·x))`` by GGML names. x float32 [rows, d] -> float32 [rows, d].

        With int8 activations gate and up share one quantisation of x, and down has its own.
        """
        matrix = self.weights.matrix
        index = FeedForwardIndex(matrix(gate), matrix(up), matrix(down), activation)
        launches, y = self._given.feed_forward(index, x, self._floats(float_activations))
        self.run(launches)
        return y

    def feed_forward(
        self, x: DeviceArray, layer: int, *, float_activations: bool | None = None
    ) -> DeviceArray:
        """The same of a layer, from :attr:`index`: a second call with as many rows looks nothing
        up by name, formats nothing and compiles nothing."""
        index = self._entry(layer)
        launches, y = self._given.feed_forward(index, x, self._floats(float_activations))
        self.run(launches)
        return y

    def run_feed_forward(
        self, x: NDArray[np.float32], layer: int, *, float_activations: bool | None = None
    ) -> NDArray[np.float32]:
        """The same from NumPy to NumPy: upload, run, one synchronisation, download."""
        y = self.feed_forward(self.upload(x), layer, float_activations=float_activations)
        return self.download(y)

    def project_qkv(
        self, x: DeviceArray, layer: int, *, float_activations: bool | None = None
    ) -> DeviceArray:
        """q, k and v of rows x float32 [rows, d], with their biases, before norms and rotary:
        float32 [rows, (n_heads + 2 n_kv_heads) head_dim], as :meth:`attend` takes them."""
        matrices = self.lowering.qkv(self._operation(layer, ProjectQKV))
        launches, y = self._given.product(matrices, x, self._floats(float_activations))
        self.run(launches)
        return y

    def attend(self, qkv: DeviceArray, layer: int) -> DeviceArray:
        """Incremental attention of a layer: keys and values of the rows brought go into the cache
        at their positions, after norms and rotary embedding; then each row attends over its
        sequence's whole cache, its window of it. qkv: see :meth:`project_qkv` (where the family
        turns halves of a head, rows of q and k in the order of ``layout.rotary_rows``).

        Returns float32 [rows, n_heads head_dim].
        """
        op, step = self._operation(layer, ProjectQKV), self._step()
        self._require_shape(qkv, step.n_rows, op.q.n + op.k.n + op.v.n)
        out = DeviceArray(self.lowering.arena["given values"].address, (step.n_rows, op.q.n), FLOAT)
        rotary = self.lowering.rotary(op, qkv.address, step)
        self.run([rotary, self.lowering.attend(self._operation(layer, Attend), step, out)])
        return out

    def layer(self, x: DeviceArray, layer: int) -> DeviceArray:
        """A whole layer over the rows brought: norm, q/k/v, rotary, cache, attention, output,
        residual, norm, feed-forward, residual. x: the residual stream, float32 [rows, d]; so is
        what it returns, which the next layer takes."""
        begin, step = self._begin_layer(x, layer), self._step()
        launches = [one for op in self._layers[layer] for one in self.lowering.lower(op, step)]
        self.run([*begin, *launches])
        return DeviceArray(self.lowering.arena["x values"].address, x.shape, FLOAT)

    def time_layer(self, x: DeviceArray, layer: int) -> list[Span]:
        """:meth:`layer`, instrumented: what each kernel took, by the device's clock. Waits for it.
        ``headrace.profile.layer`` makes records of it. x is not kept: give it anew each time."""
        begin, step = self._begin_layer(x, layer), self._step()
        launches: list[Launch] = []
        parts: list[list[Part]] = []
        for op in self._layers[layer]:
            made = list(self.lowering.lower(op, step))
            launches += made
            parts += parts_of(self.decoder.operations.index(op), [op], made)
        if self._stamps is None:
            self._stamps = Stamps(self.device, _MOST_KERNELS)
        self._stamps.clear()
        self.run([*begin, *self._stamps.timed(launches, parts)])
        return self._stamps.spans(parts)

    # How they are put together

    def _begin_layer(self, x: DeviceArray, layer: int) -> list[Launch]:
        step, d = self._step(), self.decoder.config.d_model
        self._require_shape(x, step.n_rows, d)
        gain = self.weights.vector(self._operation(layer, ProjectQKV).norm.weight)
        arguments = c.Quantise(x.address, gain, self.lowering.activations("x", step).at(0))
        quantise = launchers.quantise(d, arguments, step.n_rows)
        return [quantise, *self.lowering.rotations(step)]

    def _floats(self, wanted: bool | None) -> bool:
        return self.lowering.floats if wanted is None else wanted

    def _entry(self, layer: int) -> FeedForwardIndex:
        if layer not in self.index:
            raise ModelError(f"layer {layer} of a model of {len(self.index)}")
        return self.index[layer]

    def _operation(self, layer: int, kind: type[T]) -> T:
        for op in self._layers.get(layer, ()):
            if isinstance(op, kind):
                return op
        raise ModelError(f"layer {layer} of a model of {len(self._layers)}")

    def _indexed(self, layer: int) -> FeedForwardIndex:
        into = self._operation(layer, FeedForwardIn)
        down = self._operation(layer, FeedForwardOut).down
        linear = self.weights.linear
        return FeedForwardIndex(linear(into.gate), linear(into.up), linear(down), into.activation)

    def _require_shape(self, x: DeviceArray, rows: int, width: int) -> None:
        if x.shape != (rows, width):
            raise DeviceError(f"an array of shape {x.shape} where {(rows, width)} is expected")


def _by_layer(decoder: Decoder) -> dict[int, list[Operation]]:
    layers: dict[int, list[Operation]] = {}
    for op in decoder.operations:
        if isinstance(op, ProjectQKV | Attend | ProjectOut | FeedForwardIn | FeedForwardOut):
            layers.setdefault(op.layer, []).append(op)
    return layers
