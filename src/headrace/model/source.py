"""One file's metadata and tensors, as a family asks for them.

A :class:`Source` remembers what it was asked for, so that :meth:`Source.finish` can prove that
nothing in the file which could change the mathematics was left unread.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from enum import Enum, auto

import numpy as np

from headrace.errors import ModelError
from headrace.gguf.types import QuantType, Tensor
from headrace.model.operations import Linear, Norm

# Keys under the architecture's prefix that say nothing about the mathematics of a decode.
_DESCRIPTIVE_KEYS = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",
    "mask_token_id",
    "use_parallel_residual",  # GPT-NeoX's; old Qwen files say true and mean nothing by it
)

# Keys of other variants, with the values at which they change nothing.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
}

# Tensors of old converters that repeat what the metadata says (rotary inverse frequencies).
_IGNORABLE_TENSORS = ("rope.freqs", "blk.*.attn_rot_embd.weight", "blk.*.attn.rotary_emb.inv_freq")


class Bias(Enum):
    """Whether a linear layer has a ``.bias`` tensor beside its ``.weight``."""

    NONE = auto()
    OPTIONAL = auto()
    REQUIRED = auto()


class Source:
    """The metadata and tensors of a file, read once each and accounted for.

    Keys are given without the architecture's prefix, tensors without ``.weight``. Everything
    raises ModelError naming the key or tensor.
    """

    def __init__(self, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(
                "general.architecture is missing: the file does not say what model it is"
            )
        self.architecture = architecture
        self.metadata = metadata
        self._tensors = tensors
        self._keys_read: set[str] = set()
        self._claimed: set[str] = set()
        self._weights: dict[str, Tensor] = {}

    # --- metadata ---

    def value(self, key: str) -> object | None:
        """The value of ``{architecture}.{key}``, or None."""
        self._keys_read.add(key)
        return self.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """An integer in ``[low, high]``; required unless there is a default."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, is {_shown(value)}")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, outside {low} … {high}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A number in ``(low, high]``, not NaN; required unless there is a default."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, is {_shown(value)}")
        if not low < value <= high:  # NaN too
            raise self.error(key, f"is {value}, outside {low} … {high}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, is {_shown(value)}")
        return value

    def _required(self, key: str, default: object | None) -> object:
        value = self.value(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing: the file is not a complete model")
        return value

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.architecture}.{key} {problem}")

    # --- tensors ---

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self._tensors

    def tensor(self, name: str, *shape: int) -> str:
        """Claim the tensor ``name`` (with its suffix) of exactly ``shape`` (NumPy order)."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"tensor {name!r} is missing: the file is not a complete model")
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name!r} has shape {list(tensor.shape)}; "
                f"the metadata of this {self.architecture} model asks for {list(shape)}"
            )
        self._claimed.add(name)
        self._weights[name] = tensor
        return name

    def rows(self, name: str) -> int:
        """The number of rows of matrix ``name``, for the one size the metadata does not give."""
        tensor = self._tensors.get(f"{name}.weight")
        if tensor is None or len(tensor.shape) != 2:
            raise ModelError(f"tensor '{name}.weight' is missing or is not a matrix")
        return tensor.shape[0]

    def norm(self, name: str, length: int, eps: float) -> Norm:
        return Norm(self.tensor(f"{name}.weight", length), eps)

    def factors(self, name: str, length: int) -> str:
        """The rotary frequency factors ``name.weight``: float32, finite and positive."""
        full_name = self.tensor(f"{name}.weight", length)
        tensor = self._tensors[full_name]
        if tensor.qtype is not QuantType.F32:
            raise ModelError(f"tensor {full_name!r} is {tensor.qtype.name}, should be F32")
        values = tensor.data.view("<f4")
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ModelError(f"tensor {full_name!r}: frequency factors must be finite and positive")
        return full_name

    def linear(self, name: str, n: int, k: int, bias: Bias = Bias.NONE) -> Linear:
        """The matrix ``name.weight [n, k]``, with ``name.bias [n]`` as ``bias`` says."""
        wanted = bias is Bias.REQUIRED or (
            bias is Bias.OPTIONAL and f"{name}.bias" in self._tensors
        )
        weight = self.tensor(f"{name}.weight", n, k)
        return Linear(weight, n, k, self.tensor(f"{name}.bias", n) if wanted else None)

    def split(self, name: str, k: int, *sizes: int) -> list[Linear]:
        """The matrix ``name.weight [sum(sizes), k]`` as one linear layer after the other.

        Their weights are zero-copy rows of the file's, named ``name.weight[first:last]``.
        """
        whole = self._weights.pop(self.tensor(f"{name}.weight", sum(sizes), k))
        parts, first = [], 0
        for n in sizes:
            last = first + n
            part_name = f"{whole.name}[{first}:{last}]"
            data = whole.data[first:last]
            self._weights[part_name] = Tensor(part_name, whole.qtype, (n, k), data)
            parts.append(Linear(part_name, n, k))
            first = last
        return parts

    # --- the proof of completeness ---

    def finish(self) -> dict[str, Tensor]:
        """The tensors claimed, once nothing that matters is left over.

        Raises ModelError for a key or tensor nobody read.
        """
        prefix = f"{self.architecture}."
        for full_key, value in self.metadata.items():
            key = full_key.removeprefix(prefix)
            if key == full_key or key in self._keys_read or key in _DESCRIPTIVE_KEYS:
                continue
            if key not in _NEUTRAL_VALUES:
                raise ModelError(
                    f"{full_key} is not a key headrace knows for {self.architecture} models: "
                    "the answers could be wrong without it"
                )
            if not isinstance(value, bool | int | float) or value not in _NEUTRAL_VALUES[key]:
                raise self.error(key, f"is {_shown(value)}: headrace does not support that")
        for name in self._tensors:
            ignorable = any(fnmatch.fnmatchcase(name, pattern) for pattern in _IGNORABLE_TENSORS)
            if name not in self._claimed and not ignorable:
                raise ModelError(
                    f"tensor {name!r} has no role in a {self.architecture} model: "
                    "the answers could be wrong without it"
                )
        return self._weights


def _shown(value: object) -> str:
    """``repr``, short enough for a one-line message."""
    if isinstance(value, str | bytes | int | float):
        shown = repr(value)
        return shown if len(shown) <= 60 else shown[:57] + "..."
    return f"of type {type(value).__name__}"
