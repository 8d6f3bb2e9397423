"""Clients that come, read a little and leave, for a while: nothing grows, nothing is lost.

HEADRACE_SOAK_SECONDS=600 makes it the ten minutes that a release should have.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import pytest
from serve_process import Server, raw_post

SECONDS = float(os.environ.get("HEADRACE_SOAK_SECONDS", "12"))
CLIENTS = 24
ALLOWED_GROWTH = 32 << 20


@pytest.mark.timeout(SECONDS + 300)
def test_a_full_queue_with_random_disconnects(start: Callable[..., Server]) -> None:
    server = start("--context", "1024", "--cache-tokens", "4096", "--max-sequences", "8",
                   "--max-waiting", "8")  # fmt: skip
    statuses: Counter[int] = Counter()
    deadline = time.monotonic() + SECONDS
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                while time.monotonic() < deadline:
                    statuses[one_request(server, http, rng)] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS / 2)  # until every page has been touched and every buffer has its size
    before = server.resident_bytes()
    for thread in threads:
        thread.join()
    assert not failures
    assert statuses.keys() <= {0, 200, 429}
    assert statuses[200] > 0
    assert statuses[429] > 0  # the queue was full
    server.check_pages()
    growth = server.resident_bytes() - before
    print(
        f"{dict(statuses)} in {SECONDS:g} s; memory grew by {growth / 1e6:.1f} MB in the 2nd half"
    )
    assert growth < ALLOWED_GROWTH
    assert server.complete(prompt="still here", max_tokens=1).status_code == 200


def one_request(server: Server, http: httpx.Client, rng: random.Random) -> int:
    """Ask something; the status, or 0 when it was left before its answer."""
    body = {
        "prompt": [rng.randrange(300, 500) for _ in range(rng.choice((1, 30, 200)))],
        "max_tokens": rng.choice((1, 8, 60)),
        "stream": rng.random() < 0.7,
        "n": rng.choice((1, 1, 1, 3)),
        "seed": rng.randrange(100),
    }
    if rng.random() < 0.4:
        with server.connect(raw_post("/v1/completions", json.dumps(body).encode())):
            time.sleep(rng.random() * 0.05)
        return 0
    return http.post("/v1/completions", json=body).status_code
