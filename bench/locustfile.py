"""Stock Locust against the HTTP port: ten /recommend over three contexts to one /recommend/batch of ten ids, users by a Zipf law.

    locust -f bench/locustfile.py --headless -u 50 -r 50 -t 30s --host http://127.0.0.1:7401

Several nodes: GMCO_HOSTS=http://a:7401,http://b:7401 (each of Locust's users asks one of them). GMCO_USERS says how many users
there are, with ids from 1 (the demo has 300); the items to score are such as were recommended before. Stands alone: Locust brings
its own Python.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import deque
from typing import Any

from locust import FastHttpUser, constant, task

USERS = int(os.environ.get("GMCO_USERS", "300"))
EXPONENT = float(os.environ.get("GMCO_ZIPF", "1.1"))
HOSTS = [host for host in os.environ.get("GMCO_HOSTS", "").split(",") if host]
CONTEXTS = ("homepage", "video_page", "search_results")

# The n-th most frequent user asks in proportion to 1 / n^EXPONENT.
_CUMULATED = list(itertools.accumulate(1 / rank**EXPONENT for rank in range(1, USERS + 1)))
# Items that were recommended of late, to whomever.
_SEEN: deque[int | str] = deque(maxlen=1_000)
_NEXT_HOST = itertools.cycle(HOSTS or [""])


def a_user() -> int:
    return random.choices(range(1, USERS + 1), cum_weights=_CUMULATED)[0]


class App(FastHttpUser):
    """One app, as fast as it is answered."""

    wait_time = constant(0)

    def __init__(self, environment) -> None:  # type: ignore[no-untyped-def]
        # Before the client is made, which takes the host that it finds.
        self.host = next(_NEXT_HOST) or environment.host
        super().__init__(environment)

    @task(10)
    def recommend(self) -> None:
        context = random.choice(CONTEXTS)
        target = f"/recommend?user_id={a_user()}&k=10&context={context}"
        with self.client.get(target, name=f"/recommend {context}", catch_response=True) as response:
            found = self._check(response, "hits")
            _SEEN.extend(hit["media_id"] for hit in found.get("hits", ()))

    @task(1)
    def batch(self) -> None:
        if len(_SEEN) < 10:
            self.recommend()
            return
        body = {"user_id": a_user(), "media_ids": random.sample(_SEEN, 10)}
        with self.client.post("/recommend/batch", json=body, catch_response=True) as response:
            self._check(response, "unknown")

    @staticmethod
    def _check(response, field: str) -> dict[str, Any]:  # type: ignore[no-untyped-def]
        """The answer; a partial one counts as failed, too."""
        if response.status_code != 200:
            response.failure(f"{response.status_code} {(response.text or '')[:200]}")
            return {}
        found: dict[str, Any] = response.json()
        if field not in found or found["coverage"]["answered"] != found["coverage"]["total"]:
            response.failure(f"not whole: {found.get('coverage')}")
        return found
