"""Which type each tensor has in a file of a named quantisation recipe.

The mixtures are those of llama.cpp's quantiser (``llama_tensor_get_type`` in ``llama-quant.cpp``)
for dense models without an importance matrix, so that a synthetic file reads the same bytes a token
as a downloaded one. Where K is not a multiple of a K-quant's block, its fall-backs apply too, with
one difference: Q2_K and Q3_K fall back to Q4_0 (as it did once) instead of IQ4_NL.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.gguf.types import QuantType


@dataclass(frozen=True)
class Recipe:
    """``file_type`` is the number stored as ``general.file_type``; ``base`` the type of most."""

    name: str
    file_type: int
    base: QuantType


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("F32", 0, QuantType.F32),
        Recipe("F16", 1, QuantType.F16),
        Recipe("Q4_0", 2, QuantType.Q4_0),
        Recipe("Q4_1", 3, QuantType.Q4_1),
        Recipe("Q8_0", 7, QuantType.Q8_0),
        Recipe("Q5_0", 8, QuantType.Q5_0),
        Recipe("Q5_1", 9, QuantType.Q5_1),
        Recipe("Q2_K", 10, QuantType.Q2_K),
        Recipe("Q3_K_M", 12, QuantType.Q3_K),
        Recipe("Q4_K_M", 15, QuantType.Q4_K),
        Recipe("Q5_K_M", 17, QuantType.Q5_K),
        Recipe("Q6_K", 18, QuantType.Q6_K),
        Recipe("BF16", 32, QuantType.BF16),
    )
}

_FALL_BACK = {
    QuantType.Q2_K: QuantType.Q4_0,
    QuantType.Q3_K: QuantType.Q4_0,
    QuantType.Q4_K: QuantType.Q5_0,
    QuantType.Q5_K: QuantType.Q5_1,
    QuantType.Q6_K: QuantType.Q8_0,
}


def tensor_type(
    recipe: Recipe, name: str, shape: tuple[int, ...], *, n_layers: int, n_gqa: int, tied: bool
) -> QuantType:
    """The type of tensor ``name`` of ``shape`` (NumPy order).

    ``n_gqa``: query heads for each key head. ``tied``: the model has no ``output.weight``, so that
    the embedding is quantised as the output would be.
    """
    if len(shape) < 2:
        return QuantType.F32
    if recipe.base in (QuantType.F32, QuantType.F16, QuantType.BF16):
        return recipe.base
    qtype: QuantType = recipe.base
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        qtype = QuantType.Q8_0 if recipe.base is QuantType.Q8_0 else QuantType.Q6_K
    elif name.startswith("blk."):
        _, layer, role, _ = name.split(".")
        qtype = _layer_type(recipe, role, int(layer), n_layers, n_gqa)
    return _FALL_BACK[qtype] if shape[-1] % qtype.block_size else qtype


def _layer_type(recipe: Recipe, role: str, layer: int, n_layers: int, n_gqa: int) -> QuantType:
    if recipe.name in ("Q4_K_M", "Q5_K_M"):
        more = role in ("attn_v", "ffn_down") and _use_more_bits(layer, n_layers)
        return QuantType.Q6_K if more else recipe.base
    if recipe.name == "Q3_K_M":
        if role == "attn_v":
            return QuantType.Q5_K if layer < 2 else QuantType.Q4_K
        if role == "ffn_down":
            return QuantType.Q5_K if layer < n_layers // 16 else QuantType.Q4_K
        return QuantType.Q4_K if role == "attn_output" else recipe.base
    if recipe.name == "Q2_K":
        if role == "attn_v":
            return QuantType.Q4_K if n_gqa >= 4 else QuantType.Q3_K
        return QuantType.Q3_K if role in ("ffn_down", "attn_output") else recipe.base
    return recipe.base


def _use_more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
