"""Connections never take the files that the shards need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.config import LimitsConfig
from node.openfiles import CONNECTIONS_MIN, PER_SHARD, RESERVED, fit
from node.server import REJECTED_POLITELY


def test_with_room_for_all_the_settings_stand() -> None:
    limits = LimitsConfig(connections=500, http_connections=400, peer_connections=300)
    assert fit(limits, shards=12, files=20_000) == limits


COUNTS = st.integers(1, 5_000)


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 200), st.integers(64, 20_000))
def test_what_is_left_over_is_enough_for_the_shards(
    apps: int, http: int, peers: int, shards: int, files: int
) -> None:
    limits = LimitsConfig(connections=apps, http_connections=http, peer_connections=peers)
    fitted = fit(limits, shards=shards, files=files)
    assert 1 <= fitted.connections <= apps
    assert 1 <= fitted.http_connections <= http
    assert 1 <= fitted.peer_connections <= peers
    taken = fitted.connections + fitted.http_connections + fitted.peer_connections + REJECTED_POLITELY
    left = files - taken
    assert (
        left >= RESERVED + PER_SHARD * shards
        or max(fitted.connections, fitted.http_connections, fitted.peer_connections) <= CONNECTIONS_MIN
    )
