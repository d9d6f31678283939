"""Sealing and opening packets with keys that can be exchanged while a cluster runs. Pure: random bytes come from the caller.

Laws:
* no nonce is used twice under one key: it is a session, random at the start of a process, and a counter; a session whose
  counter is used up is followed by the next;
* a key's AES key is derived with the cluster's id, so a packet of another cluster cannot be opened, whatever its key;
* all keys open, the first one seals; there is always a first one.

Keys are shown as fingerprints only. The page is docs/gossip.md, "Bytes" and "Keys".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gossip.codec import SEAL_BYTES, STREAM_PACKET_BYTES_MAX
from gossip.errors import DroppedError, KeyringError

MAJOR_VERSION: Final = 1
KEY_BYTES = 32
KEYS_MAX = 8
_COUNTERS = 1 << 32
_SESSIONS = 1 << 64
_MARK = ord("g")
_TAG_BYTES = 16
_HEADER = struct.Struct("<BBB4sQI")
_HEADER_BYTES = _HEADER.size
# Session and counter within the header.
_NONCE = slice(7, 19)
assert _HEADER_BYTES + _TAG_BYTES == SEAL_BYTES


class Opened(NamedTuple):
    plain: bytes
    session: int
    counter: int
    # Of the key that it was sealed with.
    fingerprint: str


@dataclass(frozen=True, slots=True)
class KeyView:
    """derived: made from the cluster's id, so it keeps nobody out. primary: packets are sealed with it."""

    fingerprint: str
    primary: bool
    derived: bool


class _Key:
    """One key in use. secret None: derived from the cluster's id."""

    __slots__ = ("aead", "byte", "fingerprint", "secret")

    def __init__(self, cluster: str, secret: bytes | None) -> None:
        self.secret = secret
        material = secret if secret is not None else b"nobody is kept out:" + cluster.encode()
        digest = sha256(material).digest()
        self.fingerprint = digest[:4].hex()
        self.byte = digest[0]
        derive = HKDF(SHA256(), KEY_BYTES, salt=b"GMC-O gossip", info=cluster.encode())
        self.aead = AESGCM(derive.derive(material))


class Keyring:
    """The keys of one node in one cluster. Not thread-safe."""

    def __init__(
        self, cluster: str, keys: Sequence[bytes | None], *, random_bytes: Callable[[int], bytes]
    ) -> None:
        """keys: 32 random bytes each, the primary first; None stands for the key derived from the cluster's id, and
        so does an empty list. random_bytes: `os.urandom`, but for tests. Raises KeyringError."""
        self._cluster = cluster
        self._fingerprint = sha256(cluster.encode()).digest()[:4]
        self._session = int.from_bytes(random_bytes(8), "little")
        self._counter = 0
        self._keys: list[_Key] = []
        self.restore(keys or [None])

    @property
    def insecure(self) -> bool:
        """Whether whoever knows the cluster's id can read and write."""
        return any(key.secret is None for key in self._keys)

    def seal(self, plain: bytes) -> bytes:
        counter = self._counter
        if counter == _COUNTERS:
            # Receivers take the next number as the newer session.
            self._session = (self._session + 1) % _SESSIONS
            counter = 0
        self._counter = counter + 1
        key = self._keys[0]
        header = _HEADER.pack(_MARK, MAJOR_VERSION, key.byte, self._fingerprint, self._session, counter)
        return header + key.aead.encrypt(header[_NONCE], plain, header)

    def open(self, packet: bytes) -> Opened:
        """Raises DroppedError; whether it is a replay is asked of `Replays`, once its sender is known."""
        if not packet or packet[0] != _MARK or len(packet) < SEAL_BYTES:
            raise DroppedError("not_gossip")
        if len(packet) > STREAM_PACKET_BYTES_MAX:
            raise DroppedError("too_large")
        _, major, byte, cluster, session, counter = _HEADER.unpack_from(packet)
        if major != MAJOR_VERSION:
            raise DroppedError("newer_version")
        if cluster != self._fingerprint:
            raise DroppedError("other_cluster")
        header, sealed = packet[:_HEADER_BYTES], packet[_HEADER_BYTES:]
        known = False
        for key in self._keys:
            # One byte names a key well enough to try it; two of eight may share it.
            if key.byte != byte:
                continue
            known = True
            try:
                plain = key.aead.decrypt(header[_NONCE], sealed, header)
            except InvalidTag:
                continue
            return Opened(plain, session, counter, key.fingerprint)
        raise DroppedError("forged" if known else "unknown_key")

    def view(self) -> list[KeyView]:
        return [
            KeyView(key.fingerprint, primary=place == 0, derived=key.secret is None)
            for place, key in enumerate(self._keys)
        ]

    def install(self, secret: bytes) -> str:
        """Packets sealed with it can be opened from now on. Returns its fingerprint; again is fine. Raises KeyringError."""
        key = self._checked(secret)
        for one in self._keys:
            if one.secret == secret:
                return one.fingerprint
            if one.fingerprint == key.fingerprint:
                raise KeyringError(
                    "fingerprint_taken", f"another key has the fingerprint {key.fingerprint}; make a new key"
                )
        if len(self._keys) >= KEYS_MAX:
            raise KeyringError("ring_full", f"the keyring holds {KEYS_MAX} keys; remove one first")
        self._keys.append(key)
        return key.fingerprint

    def use(self, fingerprint: str) -> None:
        """Packets are sealed with that key from now on. Raises KeyringError."""
        key = self._known(fingerprint)
        self._keys.remove(key)
        self._keys.insert(0, key)

    def remove(self, fingerprint: str) -> None:
        """Packets sealed with that key are not opened any more. Raises KeyringError."""
        key = self._known(fingerprint)
        if len(self._keys) == 1:
            raise KeyringError("last_key", f"{fingerprint} is the only key; install another one first")
        if key is self._keys[0]:
            raise KeyringError("key_in_use", f"packets are sealed with {fingerprint}; use another key first")
        self._keys.remove(key)

    def secrets(self) -> list[bytes | None]:
        """What `restore` takes: for the key file."""
        return [key.secret for key in self._keys]

    def restore(self, keys: Sequence[bytes | None]) -> None:
        """Replaces all keys; packets go on in the same session. Raises KeyringError, and changes nothing then."""
        if not 1 <= len(keys) <= KEYS_MAX:
            raise KeyringError("ring_full", f"a keyring holds 1 to {KEYS_MAX} keys, not {len(keys)}")
        if len(set(keys)) < len(keys):
            raise KeyringError("fingerprint_taken", "a keyring holds a key only once")
        self._keys = [self._checked(secret) for secret in keys]

    def _checked(self, secret: bytes | None) -> _Key:
        if secret is not None and len(secret) != KEY_BYTES:
            raise KeyringError("invalid_key", f"a key has {KEY_BYTES} bytes, this one has {len(secret)}")
        return _Key(self._cluster, secret)

    def _known(self, fingerprint: str) -> _Key:
        for key in self._keys:
            if key.fingerprint == fingerprint:
                return key
        raise KeyringError(
            "unknown_key", f"no key {fingerprint} in the keyring; list the keys, or install it"
        )
