"""Every kernel compiles for every supported GPU generation, with no register spilled.

NVRTC needs no GPU. Shapes are those of Llama 8B and Gemma, where register pressure is highest.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from headrace.cuda import arguments as c
from headrace.cuda import gemm as gemms
from headrace.cuda import launchers, products
from headrace.cuda import skinny as skinnies
from headrace.cuda.compile import Resources, Specialisation, resources
from headrace.cuda.device import Launch, array
from headrace.cuda.launchers import CacheShape
from headrace.cuda.layout import FLOAT_TYPES, TileLayout
from headrace.cuda.products import Activations, Matrix
from headrace.cuda.token import token, token_shape
from headrace.gguf.types import QuantType as Q
from headrace.model import operations as o

SHARED_KB = {"75": 64, "80": 163, "86": 99, "89": 99, "90a": 227, "100": 227, "120": 99}
LOGITS = {"LOGIT_SCALE": 1.0, "SOFTCAP": 30.0}


@dataclass
class PaperDevice:
    """A device of which only the sizes are known."""

    target: str

    def __post_init__(self) -> None:
        self.arch = int("".join(digit for digit in self.target if digit.isdigit()))
        self.shared_limit = SHARED_KB[self.target] << 10
        self.sm_count = 132


def matrix(qtype: Q, n: int, k: int) -> Matrix:
    return Matrix(256, TileLayout(qtype, n, k))


def rows_of(k: int, rows: int = 8) -> Activations:
    a = array(256, (rows, k), "f4")
    return Activations(k, rows, a, a, a, a, a)


def matvecs(device: PaperDevice) -> list[Launch]:
    def matvec(matrices, epilogue, rows=1, **how) -> Launch:
        x = rows_of(matrices[0].layout.k)
        return products.matvec(device, matrices, x, epilogue, rows, **how)

    llama, made = CacheShape(32, 8, 128, 128), []
    for qtype in Q:
        head = matrix(qtype, 1000, 2048)
        made.append(matvec([head], c.Store(), macros=LOGITS, norm_eps=1e-5))
        if qtype not in FLOAT_TYPES:
            made.append(matvec([head], c.Store(), 8, macros=LOGITS))
    made.append(matvec([matrix(Q.Q4_K, 1000, 2048)], c.Store(), macros=LOGITS, floats=True))
    made.append(matvec([matrix(Q.Q5_0, 1000, 1152)], c.Store(), macros=LOGITS, floats=True))
    qkv = [matrix(Q.Q4_K, 4096, 4096), matrix(Q.Q4_K, 1024, 4096), matrix(Q.Q6_K, 1024, 4096)]
    for rows in (1, 8):
        made.extend(
            matvec(qkv, c.Rotary(), rows, norm_eps=1e-5, macros=shape.macros)
            for shape in (llama, QUANTISED[0])
        )
        made.append(matvec([matrix(Q.Q6_K, 4096, 14336)], c.Residual(), rows))
        pair = [matrix(Q.Q4_K, 14336, 4096)] * 2
        for activation in ("SILU", "GELU_TANH"):
            how = {"norm_eps": 1e-5, "macros": {"ACTIVATION": activation}}
            made.append(matvec(pair, c.Product(), rows, **how))
    return made


def prompts(device: PaperDevice) -> list[Launch]:
    if device.arch < 80:
        return []

    def gemm(matrices, epilogue, rows, **how) -> Launch:
        x = rows_of(matrices[0].layout.k, rows)
        return gemms.gemm(device, matrices, x, epilogue, rows, **how)

    llama, made = CacheShape(32, 8, 128, 128), []
    if device.target in ("80", "90a"):  # the two ways to multiply
        made.extend(gemm([matrix(t, 1000, 2048)], c.Store(), 1024, macros=LOGITS) for t in Q)
    qkv = [matrix(Q.Q4_K, 4096, 4096), matrix(Q.Q4_K, 1024, 4096), matrix(Q.Q6_K, 1024, 4096)]
    few = gemms.SplitWork(256, 1 << 30, 256)
    how = {"norm_eps": 1e-5, "macros": llama.macros}
    made.append(gemm(qkv, c.Rotary(), 32, work=few, **how))
    made.append(gemm([matrix(Q.Q6_K, 4096, 14336)], c.Residual(), 8, work=few))
    made.append(gemm(qkv, c.Rotary(), 512, **how))
    made.append(gemm([matrix(Q.Q6_K, 4096, 14336)], c.Residual(), 1024))
    pair = [matrix(Q.Q4_K, 14336, 4096)] * 2
    how = {"norm_eps": 1e-5, "macros": {"ACTIVATION": "SILU"}}
    made.append(gemm(pair, c.Product(), 1024, **how))
    q8 = QUANTISED[0].macros
    made.append(gemm(qkv, c.Rotary(), 32, work=few, norm_eps=1e-5, macros=q8))
    made.append(gemm(qkv, c.Rotary(), 512, norm_eps=1e-5, macros=q8))
    arguments = c.PromptAttend(n_rows=512)
    for shape, window, softcap in SHAPES:
        how = {"scale": 0.1, "window": window, "softcap": softcap}
        made.append(launchers.prompt_attend(device, shape, arguments, **how))
    return made


def few(device: PaperDevice) -> list[Launch]:
    if device.arch < 80:
        return []

    def skinny(matrices, epilogue, rows, **how) -> Launch:
        x = rows_of(matrices[0].layout.k, rows)
        return skinnies.skinny(device, matrices, x, epilogue, rows, **how)

    llama, made = CacheShape(32, 8, 128, 128), []
    if device.target in ("80", "90a"):
        quantised = sorted(set(Q) - FLOAT_TYPES)
        made.extend(
            skinny([matrix(t, 1000, 2304)], c.Store(), 16, macros=LOGITS) for t in quantised
        )
    qkv = [matrix(Q.Q4_K, 4096, 4096), matrix(Q.Q4_K, 1024, 4096), matrix(Q.Q6_K, 1024, 4096)]
    pair = [matrix(Q.Q4_K, 14336, 4096)] * 2
    for rows in (8, 16):
        made.append(skinny(qkv, c.Rotary(), rows, norm_eps=1e-5, macros=llama.macros))
        made.append(skinny([matrix(Q.Q6_K, 4096, 14336)], c.Residual(), rows))
        how = {"norm_eps": 1e-5, "macros": {"ACTIVATION": "SILU"}}
        made.append(skinny(pair, c.Product(), rows, **how))
    return made


QUANTISED = [CacheShape(32, 8, dim, dim, quantised=True) for dim in (128, 64, 96, 256)]
SHAPES = (
    (CacheShape(32, 8, 128), None, None),
    (CacheShape(32, 8, 64), None, None),
    (CacheShape(4, 1, 256, 256), 512, 50.0),
    *((shape, None, None) for shape in QUANTISED),
)


def llama(d_model: int, d_ff: int, head_dim: int) -> SimpleNamespace:
    """A decoder of two layers of which only the sizes and types are known, as in Q4_K_M."""
    weights, operations, norm = {}, [o.Embed("e")], o.Norm("n", 1e-5)

    def linear(name: str, n: int, k: int, qtype: Q = Q.Q4_K) -> o.Linear:
        weights[name] = SimpleNamespace(qtype=qtype)
        return o.Linear(name, n, k)

    for layer, other in enumerate((Q.Q4_K, Q.Q6_K)):
        q, kv = 32 * head_dim, 8 * head_dim
        operations += [
            o.ProjectQKV(
                layer, norm, linear(f"q{layer}", q, d_model), linear(f"k{layer}", kv, d_model),
                linear(f"v{layer}", kv, d_model, other), None, None,
                o.Rope(1e4, head_dim, o.Pairing.INTERLEAVED), 32, 8, head_dim,
            ),
            o.Attend(layer, 32, 8, head_dim, head_dim**-0.5),
            o.ProjectOut(layer, linear(f"o{layer}", d_model, q)),
            o.FeedForwardIn(
                layer, norm, linear(f"g{layer}", d_ff, d_model), linear(f"u{layer}", d_ff, d_model),
                o.Activation.SILU,
            ),
            o.FeedForwardOut(layer, linear(f"d{layer}", d_model, d_ff, other)),
        ]  # fmt: skip
    operations.append(o.Head(norm, linear("h", 1000, d_model)))
    return SimpleNamespace(operations=operations, weights=weights)


def tokens(device: PaperDevice) -> list[Launch]:
    shapes = (
        token_shape(llama(*sizes), device) for sizes in ((4096, 14336, 128), (2048, 8192, 64))
    )
    return [token(shape, c.Token()) for shape in shapes if shape]


def others(device: PaperDevice) -> list[Launch]:
    made = []
    made.append(launchers.rotations(CacheShape(32, 8, 128, 128), c.Rotations(), 1))
    for shape, window, softcap in SHAPES:
        how = {"scale": 0.1, "window": window, "softcap": softcap}
        made.append(launchers.attend(device, shape, c.Attend(), 1, 64, **how))
        norms = {"eps": 1e-6, "q_norm": True, "k_norm": True}
        made.append(launchers.rotary(shape, c.RotaryHeads(), 1, **norms))
    for qtype in (Q.Q4_K, Q.Q6_K, Q.Q8_0, Q.F16):
        made.append(launchers.embed(matrix(qtype, 1000, 1280), c.Embed(), 1, scale=2.0))
        layout = TileLayout(qtype, 32, 1280)
        made.append(launchers.reorder(layout, 0, 0, 0, 32, head_dim=0, rope_dim=0))
    made.append(launchers.post_norm(1152, c.PostNorm(), 1, eps=1e-6))
    vocabularies = (launchers.SampleShape(n) for n in (512, 128256, 262208))
    made.extend(launchers.sample(shape, c.Sample(), 1) for shape in vocabularies)
    made.append(launchers.read(device, 0, 1 << 20, 0))
    kinds = ("DOTS", "FMAS", "TENSORS") if device.arch >= 80 else ("DOTS", "FMAS")
    made.extend(launchers.peak(device, 0, kind)[0] for kind in kinds)
    made.append(launchers.quantise(1152, c.Quantise(), 1))
    return made + [launchers.timed(launch, 0) for launch in made]


@pytest.mark.parametrize("target", list(SHARED_KB))
def test_compiles_without_spills(target: str) -> None:
    device = PaperDevice(target)
    launches = matvecs(device) + few(device) + prompts(device) + tokens(device) + others(device)
    specs = list(dict.fromkeys(launch.spec for launch in launches))
    assert {spec.name for spec in specs} >= {
        "matvec",
        "attend",
        "rotary",
        "embed",
        "post_norm",
        "sample",
    }

    def compiled(spec: Specialisation) -> Resources:
        return resources(spec, target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(specs, pool.map(compiled, specs), strict=True))
    spilling = {spec.name: r for spec, r in found.items() if r.spill_bytes}
    assert not spilling
    assert not {spec for spec, r in found.items() if r.serialised}
    most = max(r.registers for r in found.values())
    print(f"sm_{target}: {len(specs)} kernels, at most {most} registers")
    for launch in launches:
        assert launch.shared_bytes <= device.shared_limit, launch.spec.name
