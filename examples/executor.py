"""The resident executor, capability by capability: ``python examples/executor.py MODEL``.

Needs an NVIDIA GPU. Every call queues kernels and returns at once; only ``download`` waits.
"""

from __future__ import annotations

import sys

import numpy as np

from headrace import hub
from headrace.backend import Batch, DecodeRow
from headrace.cuda.device import Device
from headrace.cuda.executor import Executor
from headrace.cuda.runner import CUDARunner
from headrace.errors import ModelError
from headrace.gguf import open_gguf
from headrace.model import load_decoder
from headrace.model.decoder import Decoder
from headrace.sampling import SamplingParams


def one_sequence(positions: range, n_pages: int) -> Batch:
    """The rows of one sequence whose pages are 0, 1, …"""
    numbers = np.array(positions, np.int32)
    zeros, table = np.zeros_like(numbers), np.arange(n_pages, dtype=np.int32)[None]
    return Batch(zeros, numbers, zeros, table, zeros[:0])


def show_operations(decoder: Decoder, device: Device | None = None) -> None:
    executor = Executor(decoder, device, max_rows=8)
    rows = np.random.default_rng(0).standard_normal((2, decoder.config.d_model))
    x = executor.upload(rows.astype(np.float32))

    # Feed-forward: weights by GGML name, with float and with int8 activations.
    names = [f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down")]
    y = executor.feed_forward_by_name(x, *names, float_activations=True)
    exact = executor.download(y)
    y = executor.feed_forward_by_name(x, *names, float_activations=False)
    rounded = executor.download(y)
    print("int8 activations differ by", np.linalg.norm(rounded - exact) / np.linalg.norm(exact))

    # By index: resolved at load, nothing is looked up by name. And from NumPy to NumPy.
    gate = executor.index[0].gate
    print(f"gate at {gate.address:#x}: {gate.layout.n_bytes:,} bytes of {gate.layout.qtype.name}")
    executor.feed_forward(x, 0)
    executor.run_feed_forward(rows.astype(np.float32), 0)

    # Which kernels that was, and with which constants.
    for ran in executor.ran:
        print(ran.kernel, ran.grid, {k: ran.constants.get(k) for k in ("K", "TYPE0", "ROWS")})

    # Incremental attention: three positions, then one more, over the same cache.
    executor.allocate_cache(n_pages=1)
    for positions in (range(3), range(3, 4)):
        executor.bring(one_sequence(positions, 1))
        x = executor.upload(np.ones((len(positions), decoder.config.d_model), np.float32))
        out = executor.attend(executor.project_qkv(x, 0), 0)
    print("attention", executor.download(out).shape)

    # Whole layers, chained on the device.
    before = executor.counters.synchronisations
    for layer in executor.index:
        x = executor.layer(x, layer)
    print(f"{executor.counters.synchronisations - before} synchronisations in all layers")
    print("residual stream", executor.download(x).shape)

    # Errors are typed and say what is wrong.
    try:
        executor.matvec(x, "blk.0.ffn_sideways.weight")
    except ModelError as error:
        print("ModelError:", error)
    executor.close()


def show_decoding(decoder: Decoder, device: Device | None = None) -> None:
    """A token is one graph launch; the host reads its id from memory that the device writes."""
    runner = CUDARunner(decoder, device, max_rows=8)
    runner.allocate_cache(2)
    row = DecodeRow([1], [0, 1], 1, SamplingParams(temperature=0.8), seed=7)
    burst = runner.decode([row], 8)
    first = next(burst)  # captures the graph
    before = runner.counters.graph_launches, runner.counters.synchronisations
    tokens = [choices[0].token for choices in burst]
    print("tokens", [first[0].token, *tokens])
    print(f"{runner.counters.graph_launches - before[0]} graph launches,", end=" ")
    print(f"{runner.counters.synchronisations - before[1]} synchronisations after the first")
    for what, n_bytes in runner.memory_plan()[:4]:
        print(f"{n_bytes:14,}  {what}")
    runner.close()


if __name__ == "__main__":
    model = load_decoder(open_gguf(hub.resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2")))
    show_operations(model)
    show_decoding(model)
