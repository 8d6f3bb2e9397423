"""``headrace serve`` over a device that runs out of memory when a prompt begins with one token.

python failing_server.py MODEL TOKEN --port 0
"""

from __future__ import annotations

import sys

import headrace
from headrace.errors import DeviceMemoryError
from headrace.serve.server import serve
from headrace.serve.settings import load_settings


def main() -> None:
    path, token = sys.argv[1], int(sys.argv[2])
    settings = load_settings({"model": path, "name": "tiny", "port": 0})

    def load() -> headrace.Model:
        model = headrace.load(path, "cpu", chat=True, max_sequences=4)
        runner = model.engine.runner
        step = runner.step

        def failing_step(batch):
            if token in batch.tokens[batch.positions == 0]:
                raise DeviceMemoryError("step: 1,000 bytes wanted, 10 free: use a shorter context")
            return step(batch)

        runner.step = failing_step
        return model

    serve(settings, load)


if __name__ == "__main__":
    main()
