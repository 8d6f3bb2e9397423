"""The Python API in one sitting: ``python examples/python_api.py [MODEL]``."""

from __future__ import annotations

import sys

import numpy as np

import headrace


def main(name: str) -> None:
    with headrace.load(name) as model:
        # Continue a text. temperature=0 is greedy; the default samples as llama.cpp does.
        completion = model.generate("The capital of France is", max_tokens=12, temperature=0)
        print(repr(completion.text), completion.finish_reason)

        # Piece by piece. Leaving the block early cancels, and frees the cache at once.
        with model.stream("Once upon a time", max_tokens=40, seed=7, stop=["\n\n"]) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print(f"\n[{stream.completion.timings.decode_tokens_per_second:.0f} tok/s]")

        # A conversation: of the turns before, nothing is computed again.
        messages = [{"role": "user", "content": "What is gravity? One sentence."}]
        answer = model.chat(messages, max_tokens=60)
        print(answer.text)
        messages += [
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "Say it for a child."},
        ]
        answer = model.chat(messages, max_tokens=60)
        timings = answer.timings
        print(answer.text, f"[{timings.cached_tokens} of {timings.prompt_tokens} tokens cached]")

        # Several at once share each read of the weights.
        streams = [model.stream(f"{n} + {n} =", max_tokens=6, temperature=0) for n in range(2, 6)]
        print([stream.run().text for stream in streams])

        # Down to the tokens: alternatives with log probabilities, and plain logits.
        completion = model.generate("The sky is", max_tokens=1, temperature=0, logprobs=3)
        for token, logprob in completion.logprobs[0].top:
            print(f"{model.detokenize([token])!r}: {np.exp(logprob):.1%}")
        logits = model.logits(model.tokenize("The sky is", bos=True))
        print(logits.shape, model.detokenize([int(logits[-1].argmax())]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
