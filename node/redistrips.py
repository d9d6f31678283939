"""One round trip to Redis or to a Redis Cluster, by redis-py. Blocking: for a thread of its own, one call at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from node.config import CacheConfig, parse_address


class Put(NamedTuple):
    key: str
    value: bytes
    ttl_ms: int


class Brought(NamedTuple):
    """values: in the order of the keys. full: values that Redis had no memory for."""

    values: Sequence[object]
    full: int


class RedisTrips:
    """Connects when first used. `go` raises whatever redis-py and the network raise."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._client: Any = None

    def go(self, keys: Sequence[str], puts: Sequence[Put]) -> Brought:
        """Everything in one round trip; with a cluster, one per node, and the puts after the gets."""
        if self._client is None:
            self._client = self._connect()
        if isinstance(self._client, RedisCluster):
            values = self._client.mget_nonatomic(keys) if keys else ()
            results = self._send(self._client, (), puts) if puts else []
        else:
            results = self._send(self._client, keys, puts)
            values = results.pop(0) if keys else ()
        if isinstance(values, Exception):
            raise values
        if len(values) != len(keys):
            raise RedisError(f"{len(values)} values came for {len(keys)} keys")
        full = 0
        for result in results:
            if isinstance(result, OutOfMemoryError):
                full += 1
            elif isinstance(result, Exception):
                raise result
        return Brought(values, full)

    @staticmethod
    def _send(client: Any, keys: Sequence[str], puts: Sequence[Put]) -> list[Any]:
        pipe = client.pipeline(transaction=False)
        if keys:
            pipe.mget(keys)
        for put in puts:
            pipe.set(put.key, put.value, px=put.ttl_ms)
        results: list[Any] = pipe.execute(raise_on_error=False)
        return results

    def forget(self) -> None:
        """After a failure: the next trip connects anew, and asks a cluster for its nodes anew."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):  # it is broken anyway
                client.close()

    def _connect(self) -> Redis | RedisCluster:
        config = self._config
        # Retrying is for the breaker to decide: a trip must end within what one wait takes.
        options: dict[str, Any] = {
            "socket_timeout": config.redis_timeout_ms / 1000,
            "socket_connect_timeout": config.redis_timeout_ms / 1000,
            "protocol": 2,
        }
        if config.redis:
            return Redis.from_url(config.redis, retry=Retry(NoBackoff(), 0), **options)
        node: Any = ClusterNode  # untyped there
        nodes = [node(*parse_address(one)) for one in config.redis_cluster]
        # One retry: that is what follows a slot to its new node.
        return RedisCluster(
            startup_nodes=nodes, retry=Retry(NoBackoff(), 1), require_full_coverage=False, **options
        )
