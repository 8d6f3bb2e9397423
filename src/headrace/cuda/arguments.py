"""The C structs that the kernels take, field for field (kernels/*.cu)."""

from __future__ import annotations

from ctypes import Structure, c_int, c_uint64, c_void_p


class Rows(Structure):
    """kernels/activations.cuh"""

    _fields_ = [
        ("values", c_void_p),
        ("quants", c_void_p),
        ("scales", c_void_p),
        ("squares", c_void_p),
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


class Embed(Structure):
    _fields_ = [("weights", c_void_p), ("tokens", c_void_p), ("x", Rows), ("gain", c_void_p)]


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


class Attend(Structure):
    _fields_ = [
        ("q", c_void_p),
        ("cache", Cache),
        ("out", Rows),
        ("partial", c_void_p),
        ("partial_max_sum", c_void_p),
        ("arrived", c_void_p),
    ]


class Argmax(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("best", c_void_p),
        ("arrived", c_void_p),
        ("token", c_void_p),
        ("position", c_void_p),
        ("step", c_void_p),
        ("ring", c_void_p),
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
