"""A full disk under a real node: writes are refused with a clear error, reads go on, and room brings writes back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import cluster

DIM = 256
SIZE_MIB = 24


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of SIZE_MIB. Only root may mount; as another user storage's own tests of a full disk have to do."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_writes_keeps_reads_and_recovers(small_disk: Path) -> None:
    storage = f"dim = {DIM}\nwal_segment_bytes = 1048576\ncheckpoint_bytes = 1048576"
    with cluster(small_disk, 1, storage=storage, replication=1, shard_count=2) as (daemon,):
        with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
            written: list[int] = []
            refused: gmco.GmcoError | None = None
            for start in range(1, 200_000, 100):
                items = [
                    gmco.Item(i, [float(i % 7 + 1)] * DIM, (), {"n": i}) for i in range(start, start + 100)
                ]
                try:
                    client.put_items(items, timeout_s=2.0)
                except gmco.GmcoError as error:
                    refused = error
                    break
                written += [item.media_id for item in items]
            assert refused is not None, "the disk never got full"
            assert refused.code == "disk_full", refused
            assert written
            _all_there(client, written)
            assert len(client.search([1.0] * DIM, 10).hits) == 10
            ballast = subprocess.run(
                ["mount", "-o", f"remount,size={SIZE_MIB * 4}m", str(small_disk)],
                capture_output=True,
                text=True,
            )
            assert ballast.returncode == 0, ballast.stderr
            client.put_items([gmco.Item(900_000, [1.0] * DIM, (), {"n": 900_000})], timeout_s=20.0)
            _all_there(client, [*written, 900_000])
        daemon.kill()
        daemon.start()
        with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
            _all_there(client, [*written, 900_000])


def _all_there(client: gmco.BlockingClient, ids: list[int]) -> None:
    for start in range(0, len(ids), 500):
        chunk = ids[start : start + 500]
        for media_id, item in zip(chunk, client.get_items(chunk), strict=True):
            assert item is not None, f"item {media_id} was acknowledged and is gone"
            assert item.metadata == {"n": media_id}
