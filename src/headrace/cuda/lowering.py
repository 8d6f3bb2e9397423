"""Operations to launches: what each of the seven becomes on the device, over fixed buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ctypes import sizeof
from dataclasses import replace
from typing import Any

import numpy as np

from headrace.cuda import arguments as c
from headrace.cuda import gemm, launchers, products, skinny
from headrace.cuda.arena import Arena
from headrace.cuda.device import Device, DeviceArray, Launch
from headrace.cuda.layout import FLOAT_TYPES
from headrace.cuda.model_shapes import cache_shapes, next_norms, products_of
from headrace.cuda.products import (
    GROUP,
    PLAIN,
    Activations,
    Matrix,
    brain_shape,
    padded,
)
from headrace.cuda.steps import Inputs, LayerCache, Step
from headrace.cuda.token import Operations as TokenOperations
from headrace.cuda.token import TokenShape, layer_entry, token, token_shape
from headrace.cuda.tuning import Tuning
from headrace.cuda.weights import WeightIndex, row_order
from headrace.errors import DeviceError, ModelError
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Linear,
    Norm,
    Operation,
    ProjectOut,
    ProjectQKV,
    Rope,
)


class Lowering:
    """Plans the activation arena for ``max_rows`` (``prompt_rows`` of a prompt), and turns a
    :class:`Step` into launches. Steps of prompts, of the numbers of rows in ``few_rows``, and of
    ``tensor_rows`` rows or more, run on tensor cores. ``one_kernel``: all layers of other steps of
    one row are one launch, if it can be (:func:`token.token_shape`)."""

    def __init__(
        self, decoder: Decoder, device: Device, weights: WeightIndex, max_rows: int, *,
        floats: bool, tensor_rows: int | None, few_rows: range, prompt_rows: int, cache_type: str,
        one_kernel: bool, tuning: Tuning,
    ) -> None:  # fmt: skip
        self.decoder, self.device, self.weights = decoder, device, weights
        self.max_rows, self.floats, self.tuning = max_rows, floats, tuning
        self.tensor_rows, self.prompt_rows = tensor_rows, prompt_rows
        self.few_rows = few_rows if skinny.takes(decoder) else range(0)
        self.most_rows = max(max_rows, prompt_rows)
        self.arena = Arena("activations")
        self.caches: Mapping[int, LayerCache] = {}
        self.inputs: Inputs | None = None
        self._gains = dict(zip(decoder.operations, next_norms(decoder), strict=True))
        self.cache_shapes = cache_shapes(decoder, cache_type)
        self._rotations: dict[Rope, str] = {}
        possible = one_kernel and not floats and cache_type == "f16"
        self.token = token_shape(decoder, device, tuning) if possible else None
        self._reserve()

    # What is planned

    def _reserve(self) -> None:
        config, rows, operations = self.decoder.config, self.max_rows, self.decoder.operations
        most = self.most_rows
        projections = [op for op in operations if isinstance(op, ProjectQKV)]
        outs = [op.out for op in operations if isinstance(op, ProjectOut)]
        downs = [op.down for op in operations if isinstance(op, FeedForwardOut)]
        qkv = max(op.q.n + op.k.n + op.v.n for op in projections)
        heads, d_ff = max(linear.k for linear in outs), max(linear.k for linear in downs)
        self._widths = {"x": config.d_model, "attention": heads, "hidden": d_ff}
        self._reserve_activations("x", config.d_model, values=True, squares=True)
        self._reserve_activations("attention", heads, values=self._reads_floats(*outs))
        self._reserve_activations("hidden", d_ff, values=self._reads_floats(*downs))
        self.arena.reserve("q", (most, heads), np.float32)
        self.arena.reserve("dense", (most, max(config.d_model, qkv)), np.float32)
        self.arena.reserve("logits", (rows, config.n_vocab), np.float32)
        # For single operations on rows from outside (executor.py).
        widest = max(config.d_model, heads, d_ff)
        self._widths |= {"given": widest, "given hidden": d_ff}
        self._reserve_activations("given", widest, values=True)
        self._reserve_activations("given hidden", d_ff, values=True)
        self.arena.reserve("given rows", (rows, max(widest, qkv)), np.float32)
        self.arena.reserve("result", (rows, max(widest, qkv)), np.float32)
        shapes = self.cache_shapes.values()
        blocks = max(launchers.head_tiles(s.n_heads, s.n_kv_heads) for s in shapes)
        n_heads, dim = max(s.n_heads for s in shapes), max(s.cache_dim for s in shapes)
        splits = max(launchers.max_splits(self.device, s) for s in shapes)
        self.arena.reserve("attention splits", (rows, n_heads, splits, dim), np.float32)
        self.arena.reserve("attention maxima", (rows, n_heads, splits, 2), np.float32)
        self.arena.reserve("attention arrivals", (rows, blocks), np.uint32)
        if self._has_brain:
            rooms = [
                gemm.split_room(
                    self.device, [linear.n for linear in linears], linears[0].k, rows,
                    paired=isinstance(op, FeedForwardIn), tuning=self.tuning,
                )
                for op, linears in products_of(self.decoder)
            ]  # fmt: skip
            ropes = list(dict.fromkeys(op.rope for op in projections if not self._separate(op)))
            for i, rope in enumerate(ropes):
                self._rotations[rope] = f"rotations {i}"
                self.arena.reserve(self._rotations[rope], (most, rope.dim), np.float32)
            self.arena.reserve("split sums", (max(floats for floats, _ in rooms),), np.float32)
            self.arena.reserve("split arrivals", (max(n for _, n in rooms),), np.uint32)

        if self.token is not None:
            layers = (len(self.token.layers), sizeof(c.TokenLayer))
            self.arena.reserve("token layers", layers, np.uint8)
            self.arena.reserve("token units", self.token.units.shape, np.int32)
            self.arena.reserve("token barrier", (2,), np.uint32)

    def _reads_floats(self, *linears: Linear) -> bool:
        return self.floats or any(
            self.decoder.weights[linear.weight].qtype in FLOAT_TYPES for linear in linears
        )

    def _reserve_activations(
        self, name: str, width: int, *, values: bool, squares: bool = False
    ) -> None:
        if width % GROUP:
            raise ModelError(f"a width of {width}: the CUDA backend needs a multiple of {GROUP}")
        groups, given = padded(width) // GROUP, name.startswith("given")
        rows = self.max_rows if given else self.most_rows
        if values:
            self.arena.reserve(f"{name} values", (rows, width), np.float32)
        if self._has_brain and not given:
            self.arena.reserve(f"{name} brain", brain_shape(rows, width), np.uint16)
        self.arena.reserve(f"{name} quants", (self.max_rows, groups, 16), np.int8)
        self.arena.reserve(f"{name} scales", (self.max_rows, groups, 2), np.float32)
        if squares:
            self.arena.reserve(f"{name} squares", (rows, width // GROUP), np.float32)

    @property
    def _has_brain(self) -> bool:
        return self.tensor_rows is not None or len(self.few_rows) > 0 or self.prompt_rows > 0

    def few(self, step: Step) -> bool:
        """Does one kernel made for few rows do its products?"""
        return not step.prompt and step.n_rows in self.few_rows

    def brain(self, step: Step) -> bool:
        """Are its activations bfloat16?"""
        enough = self.tensor_rows is not None and step.n_rows >= self.tensor_rows
        return enough or step.prompt or self.few(step)

    def _separate(self, op: ProjectQKV) -> bool:
        """Does a kernel of its own turn q and k? Else the projection does it."""
        shape = self.cache_shapes[op.layer]
        uneven = shape.quantised and shape.head_dim % launchers.CACHE_GROUP > 0
        return op.q_norm is not None or op.k_norm is not None or op.rope.dim % 4 > 0 or uneven

    def activations(
        self, name: str, step: Step | None = None, *, width: int | None = None
    ) -> Activations:
        """In the form of a step, or int8. ``width``: of the rows, if less than there is room."""
        brain = step is not None and self.brain(step)
        unused = ("quants", "scales") if brain else ("brain",)
        arrays = (
            None if part in unused else self.arena.get(f"{name} {part}")
            for part in ("values", "quants", "scales", "squares", "brain")
        )  # fmt: skip
        rows = self.prompt_rows if step is not None and step.prompt else self.max_rows
        return Activations(width or self._widths[name], rows, *arrays)

    def allocate(self) -> None:
        self.arena.allocate(self.device)
        for name in self._widths:  # columns that pad a tile are read, and never written
            if brain := self.arena.get(f"{name} brain"):
                self.device.clear(brain.address, brain.n_bytes)
        if self.token is not None:
            self.device.upload(self.arena["token units"].address, self.token.units)
        self.clear()

    def use_cache(self, inputs: Inputs | None, caches: Mapping[int, LayerCache]) -> None:
        """Steps read and write these from now on."""
        self.inputs, self.caches = inputs, caches
        if self.token is not None and inputs is not None:
            table = b"".join(map(self._token_layer, self.token.layers))
            self.device.upload(self.arena["token layers"].address, np.frombuffer(table, np.uint8))

    def _token_layer(self, layer: TokenOperations) -> bytes:
        qkv, _, out, up, down = layer
        linear = self.weights.linear
        matrices = [*self.qkv(qkv), *(linear(one) for one in (out.out, up.gate, up.up, down.down))]
        return layer_entry(matrices, [self._gain(out), self._gain(down)], self.caches[qkv.layer])

    def clear(self) -> None:
        """Zero what kernels expect zero, also after a fault: the arrival counters."""
        for name in ("attention arrivals", "split arrivals", "token barrier"):
            if arrivals := self.arena.get(name):
                self.device.clear(arrivals.address, arrivals.n_bytes)

    def require_inputs(self) -> Inputs:
        if self.inputs is None:
            raise DeviceError("a step before allocate_cache: there is no KV cache yet")
        return self.inputs

    # What runs

    def launches(self, step: Step) -> list[Launch]:
        return [launch for _, launches in self.plan(step) for launch in launches]

    def plan(self, step: Step) -> Iterator[tuple[Sequence[Operation], list[Launch]]]:
        """(operations, what does them) of a step, in order."""
        embed, *layers, head = operations = self.decoder.operations
        if self.token is None or step.n_rows > 1 or self.brain(step):
            yield from (([one], list(self.lower(one, step))) for one in operations)
        else:
            yield [embed], list(self.lower(embed, step))
            yield layers, [self._layers(self.token, step)]
            yield [head], list(self.lower(head, step))

    def _layers(self, shape: TokenShape, step: Step) -> Launch:
        qkv, attend = shape.layers[0][:2]
        arguments = c.Token(
            self.arena["token layers"].address, self.arena["token units"].address,
            self.activations("x", step).at(0), self.activations("hidden", step).at(0),
            self._attention(attend, self.activations("attention", step)),
            self.weights.turns(qkv.rope), self.arena["token barrier"].address,
        )  # fmt: skip
        return token(shape, arguments)

    def lower(self, operation: Operation, step: Step) -> Iterator[Launch]:
        match operation:
            case Embed():
                yield from self._embed(operation, step)
            case ProjectQKV():
                yield from self._project_qkv(operation, step)
            case Attend():
                yield self.attend(operation, step)
            case ProjectOut(out=linear, post_norm=post_norm):
                yield from self._residual(operation, "attention", linear, post_norm, step)
            case FeedForwardIn():
                yield from self._feed_forward_in(operation, step)
            case FeedForwardOut(down=linear, post_norm=post_norm):
                yield from self._residual(operation, "hidden", linear, post_norm, step)
            case Head():
                yield from self._head(operation, step)

    def _gain(self, operation: Operation) -> int:
        return self.weights.vector(self._gains[operation].weight)

    def _embed(self, op: Embed, step: Step) -> Iterator[Launch]:
        matrix = self.weights.matrix(op.weight)
        x = self.activations("x", step).at(0)
        arguments = c.Embed(matrix.address, self.require_inputs().tokens.address, x, self._gain(op))
        yield launchers.embed(matrix, arguments, step.n_rows, scale=op.scale)
        yield from self.rotations(step)

    def rotations(self, step: Step) -> Iterator[Launch]:
        """The tables that the projections of a step on tensor cores turn q and k by."""
        if not self.brain(step):
            return
        positions = self.require_inputs().positions.address
        shapes = self.cache_shapes.values()
        for rope, name in self._rotations.items():
            turned = rope.dim, rope.magnitude
            shape = next(s for s in shapes if (s.rope_dim, s.magnitude) == turned)
            out = self.arena[name].address
            arguments = c.Rotations(positions, self.weights.turns(rope), out, step.n_rows)
            yield launchers.rotations(shape, arguments, step.n_rows)

    def _cache(self, layer: int) -> c.Cache:
        i, cache = self.require_inputs(), self.caches[layer]
        return c.Cache(
            cache.keys, cache.values, i.page_table.address, i.positions.address, i.slots.address,
            i.page_table.shape[1],
        )  # fmt: skip

    def _project_qkv(self, op: ProjectQKV, step: Step) -> Iterator[Launch]:
        shape, w = self.cache_shapes[op.layer], self.weights
        # A group of a quantised cache is two of skinny's units, which two blocks may have.
        separate = self._separate(op) or (self.few(step) and shape.quantised)
        brain = self.brain(step)
        dense, q = self.arena["dense"].address, self.arena["q"].address
        angles = (
            0
            if separate
            else self.arena[self._rotations[op.rope]].address
            if brain
            else w.turns(op.rope)
        )
        yield self._product(
            self.qkv(op), "x",
            c.Store(dense) if separate else c.Rotary(q, self._cache(op.layer), angles),
            step, norm=op.norm, macros=PLAIN if separate else shape.macros,
        )  # fmt: skip
        if separate:
            yield self.rotary(op, dense, step)

    def qkv(self, op: ProjectQKV) -> list[Matrix]:
        linear, order = self.weights.linear, row_order(op)
        return [linear(op.q, order), linear(op.k, order), linear(op.v)]

    def rotary(self, op: ProjectQKV, dense: int, step: Step) -> Launch:
        """q and k norms, rotary embedding and cache write of q, k and v at ``dense``."""
        w, order, norms = self.weights, row_order(op), [op.q_norm, op.k_norm]
        gains = [w.vector(norm.weight, order) if norm else 0 for norm in norms]
        eps = {norm.eps for norm in norms if norm} or {0.0}
        if len(eps) > 1:
            raise ModelError(f"layer {op.layer}: q and k norms with different epsilons {eps}")
        q, cache = self.arena["q"].address, self._cache(op.layer)
        return launchers.rotary(
            self.cache_shapes[op.layer],
            c.RotaryHeads(dense, *gains, q, cache, w.turns(op.rope)), step.n_rows,
            eps=eps.pop(), q_norm=op.q_norm is not None, k_norm=op.k_norm is not None,
        )  # fmt: skip

    def attend(self, op: Attend, step: Step, values: DeviceArray | None = None) -> Launch:
        """``values``: where to leave the result in float32, too."""
        shape, out = self.cache_shapes[op.layer], self.activations("attention", step)
        if step.prompt:
            q, cache = self.arena["q"].address, self._cache(op.layer)
            return launchers.prompt_attend(
                self.device, shape, c.PromptAttend(q, cache, out.at(0), step.n_rows),
                scale=op.scale, window=op.window, softcap=op.softcap,
            )  # fmt: skip
        if values is not None:
            out = replace(out, values=values)
        return launchers.attend(
            self.device, shape, self._attention(op, out), step.n_rows, step.longest,
            scale=op.scale, window=op.window, softcap=op.softcap, tuning=self.tuning,
        )  # fmt: skip

    def _attention(self, op: Attend, out: Activations) -> c.Attend:
        names = ("attention splits", "attention maxima", "attention arrivals")
        work = [self.arena[name].address for name in names]
        return c.Attend(self.arena["q"].address, self._cache(op.layer), out.at(0), *work)

    def _residual(
        self, op: Operation, source: str, linear: Linear, post_norm: Norm | None, step: Step
    ) -> Iterator[Launch]:
        matrix, dense = self.weights.linear(linear), self.arena["dense"]
        x = self.activations("x", step)
        residual = c.Residual(x.at(0), self._gain(op))
        yield self._product(
            [matrix], source, c.Store(dense.address) if post_norm else residual, step,
            macros=PLAIN if post_norm else {},
        )  # fmt: skip
        if post_norm:
            gain = self.weights.vector(post_norm.weight)
            arguments = c.PostNorm(dense.address, gain, x.at(0), self._gain(op))
            yield launchers.post_norm(linear.n, arguments, step.n_rows, eps=post_norm.eps)

    def _feed_forward_in(self, op: FeedForwardIn, step: Step) -> Iterator[Launch]:
        w = self.weights
        yield self._product(
            [w.linear(op.gate), w.linear(op.up)], "x",
            c.Product(self.activations("hidden", step).at(0)), step, norm=op.norm,
            macros={"ACTIVATION": launchers.ACTIVATIONS[op.activation]},
        )  # fmt: skip

    def _head(self, op: Head, step: Step) -> Iterator[Launch]:
        done = 0
        for first, n_rows in step.logit_runs:
            yield self._product(
                [self.weights.linear(op.out)], "x", c.Store(self.arena["logits"].row(done)),
                step, norm=op.norm, rows=(first, n_rows),
                macros={"LOGIT_SCALE": op.logit_scale, "SOFTCAP": op.softcap or 0.0},
            )  # fmt: skip
            done += n_rows

    def _product(
        self, matrices: list[Matrix], source: str, epilogue: c.Epilogue, step: Step, *,
        norm: Norm | None = None, rows: tuple[int, int] | None = None, macros: dict[str, object],
    ) -> Launch:  # fmt: skip
        """``W x`` of the activations ``source``, with the norm before it; ``rows``: (first row,
        rows) where not all of them are wanted."""
        x, device = self.activations(source, step), self.device
        first, n = rows or (0, step.n_rows)
        how: dict[str, Any] = {"first_row": first, "norm_eps": norm.eps if norm else None}
        how |= {"macros": macros, "tuning": self.tuning}
        if self.few(step):
            return skinny.skinny(device, matrices, x, epilogue, n, **how)
        if self.brain(step):
            few = not step.prompt or rows is not None
            sums, arrivals = self.arena["split sums"], self.arena["split arrivals"]
            work = gemm.SplitWork(sums.address, sums.shape[0], arrivals.address) if few else None
            return gemm.gemm(device, matrices, x, epilogue, n, work=work, **how)
        in_gain = self.weights.vector(norm.weight) if norm else 0
        return products.matvec(
            device, matrices, x, epilogue, n, in_gain=in_gain, floats=self.floats, **how
        )
