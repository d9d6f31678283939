"""Sealing, rotation and the key file."""

from __future__ import annotations

import random
import stat
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip import keyfile
from gossip.codec import SEAL_BYTES
from gossip.errors import DroppedError, KeyringError
from gossip.keyring import KEYS_MAX, Keyring

A, B, C = bytes(32), b"b" * 32, b"c" * 32


def ring(*keys: bytes | None, cluster: str = "films", seed: int = 1) -> Keyring:
    return Keyring(cluster, keys, random_bytes=random.Random(seed).randbytes)


def refusal(keyring: Keyring, packet: bytes) -> str:
    with pytest.raises(DroppedError) as caught:
        keyring.open(packet)
    return caught.value.reason


def code(change: object, *args: object) -> str:
    assert callable(change)
    with pytest.raises(KeyringError) as caught:
        change(*args)
    return caught.value.code


def test_what_is_sealed_is_opened_by_another_node_of_the_cluster() -> None:
    ours, theirs = ring(A, seed=1), ring(A, seed=2)
    first, second = ours.seal(b"hello"), ours.seal(b"hello")
    assert len(first) == len(b"hello") + SEAL_BYTES
    assert b"hello" not in first
    one, two = theirs.open(first), theirs.open(second)
    assert one.plain == two.plain == b"hello"
    assert (one.session, one.counter + 1) == (two.session, two.counter)
    assert one.fingerprint == ours.view()[0].fingerprint


def test_reasons() -> None:
    keyring = ring(A)
    packet = keyring.seal(b"hello")
    assert refusal(keyring, b"") == "not_gossip"
    assert refusal(keyring, b"GET / HTTP/1.1\r\n\r\n" * 9) == "not_gossip"
    assert refusal(keyring, packet[: SEAL_BYTES - 1]) == "not_gossip"
    assert refusal(keyring, packet + bytes(65_536)) == "too_large"
    assert refusal(keyring, packet[:1] + b"\x02" + packet[2:]) == "newer_version"
    assert refusal(ring(A, cluster="other"), packet) == "other_cluster"
    assert refusal(ring(B), packet) == "unknown_key"


def test_each_flipped_bit_and_each_truncation_is_refused() -> None:
    keyring = ring(A)
    packet = keyring.seal(b"hello")
    for place, bit in product(range(len(packet)), range(8)):
        broken = bytearray(packet)
        broken[place] ^= 1 << bit
        refusal(keyring, bytes(broken))
    for size in range(len(packet)):
        refusal(keyring, packet[:size])
    assert refusal(keyring, packet[:-1] + bytes((packet[-1] ^ 1,))) == "forged"


def test_one_key_in_two_clusters_does_not_join_them() -> None:
    """Even where the four bytes of the cluster agree: the AES key differs."""
    packet = ring(A, cluster="films").seal(b"hello")
    other = ring(A, cluster="other")
    disguised = packet[:3] + other.seal(b"")[3:7] + packet[7:]
    assert refusal(other, disguised) == "forged"


def test_a_derived_key_keeps_clusters_apart_and_is_insecure() -> None:
    packet = ring().seal(b"hello")
    assert ring().insecure
    assert not ring(A).insecure
    assert ring(A, None).insecure, "it still lets anybody in"
    assert ring(seed=2).open(packet).plain == b"hello"
    assert refusal(ring(cluster="other"), packet) == "other_cluster"
    assert refusal(ring(A), packet) == "unknown_key"


def test_a_rotation_loses_no_packet() -> None:
    nodes = [ring(A, seed=seed) for seed in range(3)]

    def all_hear_all() -> None:
        for one, other in product(nodes, nodes):
            assert other.open(one.seal(b"x")).plain == b"x"

    all_hear_all()
    for node in nodes:
        new = node.install(B)
        all_hear_all()
    for node in nodes:
        node.use(new)
        all_hear_all()
    for node in nodes:
        node.remove(next(key.fingerprint for key in node.view() if not key.primary))
        all_hear_all()
    assert [key.fingerprint for key in nodes[0].view()] == [new]
    assert refusal(nodes[0], ring(A).seal(b"x")) == "unknown_key"


def test_refused_changes() -> None:
    keyring = ring(A)
    first = keyring.view()[0].fingerprint
    assert code(keyring.remove, first) == "last_key"
    assert code(keyring.use, "00000000") == "unknown_key"
    assert code(keyring.install, b"short") == "invalid_key"
    second = keyring.install(B)
    assert keyring.install(B) == second, "again is fine"
    assert code(keyring.remove, first) == "key_in_use"
    for n in range(KEYS_MAX - 2):
        keyring.install(bytes((n,)) * 31 + b"x")
    assert code(keyring.install, C) == "ring_full"
    before = keyring.secrets()
    assert code(keyring.restore, [A, A]) == "fingerprint_taken"
    assert code(keyring.restore, []) == "ring_full"
    assert keyring.secrets() == before


def test_nobody_sees_a_key() -> None:
    keyring = ring(B)
    assert B.hex() not in repr(keyring.view()) + repr(keyring)
    assert len(keyring.view()[0].fingerprint) == 8


def test_a_new_session_begins_before_the_counter_wraps() -> None:
    keyring = ring(A)
    keyring._counter = (1 << 32) - 1
    last, first = keyring.open(keyring.seal(b"a")), keyring.open(keyring.seal(b"b"))
    assert last.counter == (1 << 32) - 1
    assert first.counter == 0
    assert first.session == (last.session + 1) % (1 << 64)


def test_the_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keyring"
    assert keyfile.load(path) is None
    (tmp_path / "keyring.new").write_text("left by a crash")
    keyfile.save(path, [A, None])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keyfile.load(path) == [A, None]
    keyfile.save(path, [B])
    assert keyfile.load(path) == [B]
    assert [file.name for file in tmp_path.iterdir()] == ["keyring"]
    path.chmod(0o640)
    assert code(keyfile.load, path) == "keyring_exposed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "keyring_unreadable"),
        ("[]", "keyring_unreadable"),
        ('{"format": 1, "keys": ["xyz"]}', "keyring_unreadable"),
        ('{"format": 1, "keys": 5}', "keyring_unreadable"),
        ('{"format": 2, "keys": []}', "keyring_format"),
    ],
)
def test_a_file_that_is_no_keyring(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "keyring"
    path.touch(0o600)
    path.write_text(text)
    assert code(keyfile.load, path) == expected


@given(st.binary(max_size=200), st.integers(0, 19))
def test_any_bytes_are_opened_or_dropped(junk: bytes, kept: int) -> None:
    keyring = ring(A)
    for packet in (junk, keyring.seal(b"hello")[:kept] + junk):
        with pytest.raises(DroppedError):
            keyring.open(packet)
