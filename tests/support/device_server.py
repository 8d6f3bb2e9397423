"""``headrace serve`` over a device with a fault: it is slow, or runs out of memory.

python device_server.py [--load-seconds S] [--step-seconds S] [--fails-at TOKEN] SERVE'S ARGUMENTS

Loading and each step take S seconds more, so that what a test starts is still going on when the
test looks again, however fast the machine is and however busy. A prompt that begins with TOKEN
fails.
"""

from __future__ import annotations

import argparse
import sys
import time

from headrace import api
from headrace.cli import main
from headrace.errors import DeviceMemoryError
from headrace.serve import server
from headrace.serve.settings import Settings


def run() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--fails-at", type=int, default=-1)
    faults, arguments = parser.parse_known_args()
    load_sound = server.load_model

    def load(settings: Settings) -> api.Model:
        time.sleep(faults.load_seconds)
        model = load_sound(settings)
        runner = model.engine.runner

        def with_faults(method):
            def faulty(batch):
                if faults.fails_at in batch.tokens[batch.positions == 0]:
                    raise DeviceMemoryError("1,000 bytes wanted, 10 free: use a shorter context")
                time.sleep(faults.step_seconds)
                return method(batch)

            return faulty

        runner.step, runner.hidden = with_faults(runner.step), with_faults(runner.hidden)
        return model

    server.load_model = load
    sys.argv = ["headrace", "serve", *arguments]
    main()


if __name__ == "__main__":
    run()
