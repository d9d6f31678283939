"""More connections than the process may open files: they are turned away, and the logs still get their segments."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import gmco
from tests.processes.cluster import cluster

FILES = 512


def test_connections_leave_the_logs_their_files(tmp_path: Path) -> None:
    storage = "dim = 16\nwal_segment_bytes = 65536\nwal_segment_bytes_max = 0\ncheckpoint_bytes = 65536"
    with (
        cluster(tmp_path, 1, replication=1, shard_count=2, storage=storage) as (daemon,),
        ExitStack() as held,
    ):
        assert daemon.process is not None
        daemon.stop()
        daemon.start(files=FILES)
        with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
            http_port = urlsplit(client.status()["http"]).port
            assert http_port is not None
            for _ in range(FILES):
                for port in (daemon.app_port, http_port):
                    held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            deadline = time.monotonic() + 4  # half-open connections are closed after five seconds
            while time.monotonic() < deadline:
                items = [gmco.Item(i, [1.0, float(i % 13)] * 8, (), {"n": i}) for i in range(1_000)]
                client.put_items(items)  # several segments each time
        with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
            counters = client.status()["counters"]
            assert counters["server"]["rejected"] > 0
            assert counters["http"]["evicted"] > 0
        assert '"few_files"' in daemon.log.read_text()
        assert daemon.stop() == 0
