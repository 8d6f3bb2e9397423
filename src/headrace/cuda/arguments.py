"""The C structs that the kernels take, field for field (kernels/*.cu)."""

from __future__ import annotations

from ctypes import (
    Structure,
    addressof,
    c_float,
    c_int,
    c_uint32,
    c_uint64,
    c_void_p,
    memmove,
    sizeof,
)
from functools import cache


class Rows(Structure):
    """kernels/activations.cuh"""

    _fields_ = [
        ("values", c_void_p),
        ("quants", c_void_p),
        ("scales", c_void_p),
        ("squares", c_void_p),
        ("brain", c_void_p),
        ("first", c_int),
    ]


class Cache(Structure):
    """kernels/kv_cache.cuh"""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("page_table", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("max_pages", c_int),
    ]


class Store(Structure):
    """kernels/epilogues.cuh, as are the next three"""

    _fields_ = [("y", c_void_p)]


class Rotary(Structure):
    _fields_ = [("q", c_void_p), ("cache", Cache), ("turns", c_void_p)]


class Residual(Structure):
    _fields_ = [("x", Rows), ("gain", c_void_p)]


class Product(Structure):
    _fields_ = [("hidden", Rows)]


Epilogue = Store | Rotary | Residual | Product

EPILOGUES: dict[type[Structure], str] = {
    Store: "STORE",
    Rotary: "ROTARY",
    Residual: "RESIDUAL",
    Product: "PRODUCT",
}


def matvec_arguments(epilogue: Epilogue) -> type[Structure]:
    return _MATVEC[type(epilogue)]


def _matvec(out: type[Structure]) -> type[Structure]:
    fields = [
        ("weights", c_void_p * 3),
        ("bias", c_void_p * 3),
        ("x", Rows),
        ("in_gain", c_void_p),
        ("out", out),
        ("n_rows", c_int),
    ]
    return type(f"Matvec{out.__name__}", (Structure,), {"_fields_": fields})


_MATVEC = {out: _matvec(out) for out in EPILOGUES}


def gemm_arguments(epilogue: Epilogue) -> type[Structure]:
    return _GEMM[type(epilogue)]


def _gemm(out: type[Structure]) -> type[Structure]:
    fields = [
        ("weights", c_void_p * 3),
        ("bias", c_void_p * 3),
        ("x", Rows),
        ("out", out),
        ("partial", c_void_p),
        ("arrived", c_void_p),
        ("n_rows", c_int),
        ("skip", c_int),
    ]
    return type(f"Gemm{out.__name__}", (Structure,), {"_fields_": fields})


_GEMM = {out: _gemm(out) for out in EPILOGUES}


def skinny_arguments(epilogue: Epilogue) -> type[Structure]:
    return _SKINNY[type(epilogue)]


def _skinny(out: type[Structure]) -> type[Structure]:
    fields = [
        ("weights", c_void_p * 3),
        ("bias", c_void_p * 3),
        ("x", Rows),
        ("out", out),
        ("n_rows", c_int),
    ]
    return type(f"Skinny{out.__name__}", (Structure,), {"_fields_": fields})


_SKINNY = {out: _skinny(out) for out in EPILOGUES}


class Embed(Structure):
    _fields_ = [("weights", c_void_p), ("tokens", c_void_p), ("x", Rows), ("gain", c_void_p)]


class Quantise(Structure):
    _fields_ = [("source", c_void_p), ("gain", c_void_p), ("x", Rows)]


class PostNorm(Structure):
    _fields_ = [("y", c_void_p), ("post_gain", c_void_p), ("x", Rows), ("gain", c_void_p)]


class RotaryHeads(Structure):
    _fields_ = [
        ("qkv", c_void_p),
        ("q_gain", c_void_p),
        ("k_gain", c_void_p),
        ("q", c_void_p),
        ("cache", Cache),
        ("turns", c_void_p),
    ]


class Rotations(Structure):
    _fields_ = [
        ("positions", c_void_p),
        ("turns", c_void_p),
        ("out", c_void_p),
        ("n_rows", c_int),
    ]


class Attend(Structure):
    _fields_ = [
        ("q", c_void_p),
        ("cache", Cache),
        ("out", Rows),
        ("partial", c_void_p),
        ("partial_max_sum", c_void_p),
        ("arrived", c_void_p),
    ]


class TokenLayer(Structure):
    """kernels/token.cu, as is the next"""

    _fields_ = [
        ("weights", c_void_p * 7),
        ("bias", c_void_p * 7),
        ("gains", c_void_p * 2),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("types", c_int * 7),
        ("unused", c_int),
    ]


class Token(Structure):
    _fields_ = [
        ("layers", c_void_p),
        ("units", c_void_p),
        ("x", Rows),
        ("hidden", Rows),
        ("attention", Attend),
        ("turns", c_void_p),
        ("barrier", c_void_p),
    ]


class PromptAttend(Structure):
    _fields_ = [("q", c_void_p), ("cache", Cache), ("out", Rows), ("n_rows", c_int)]


class Request(Structure):
    """One row's sampling (kernels/sample.cu)."""

    _fields_ = [
        ("temperature", c_float),
        ("top_p", c_float),
        ("log_min_p", c_float),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("top_k", c_int),
        ("repeat_last_n", c_int),
        ("n_prompt", c_int),
        ("length", c_int),
        ("n_bias", c_int),
        ("n_logprobs", c_int),
        ("seed", c_uint32 * 2),
        ("step", c_uint32),
        ("unused", c_uint32),
    ]


class Sample(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("shaped", c_void_p),
        ("peaks", c_void_p),
        ("sums", c_void_p),
        ("arrived", c_void_p),
        ("requests", c_void_p),
        ("history", c_void_p),
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("ring", c_void_p),
        ("reports", c_void_p),
        ("capacity", c_int),
        ("ring_size", c_int),
    ]


class Reorder(Structure):
    _fields_ = [
        ("source", c_void_p),
        ("target", c_void_p),
        ("n", c_int),
        ("k", c_int),
        ("first_row", c_int),
        ("rows", c_int),
        ("head_dim", c_int),
        ("rope_dim", c_int),
    ]


class Read(Structure):
    _fields_ = [("source", c_void_p), ("n", c_uint64), ("sink", c_void_p)]


class Peak(Structure):
    _fields_ = [("sink", c_void_p)]


@cache
def _timed(kind: type[Structure]) -> type[Structure]:
    """The struct of a kernel compiled with TIMED: one more field at its end."""
    return type(f"Timed{kind.__name__}", (kind,), {"_fields_": [("stamps", c_void_p)]})


def timed(arguments: Structure, stamps: int) -> Structure:
    """A copy of a kernel's arguments with the address of its two time stamps."""
    copy = _timed(type(arguments))()
    memmove(addressof(copy), addressof(arguments), sizeof(arguments))
    copy.stamps = stamps
    return copy
