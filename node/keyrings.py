"""Changing gossip's keys on all nodes through one of them, in steps that lose no packet (docs/gossip.md, Keys)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import trio

from gossip.errors import KeyringError
from gossip.keyring import KeyView
from node.asking import ask_all
from node.links import Links
from node.members import Members
from node.peerlink import PeerError, RemoteError
from router.errors import RequestError
from router.operating import KeyAction, Keyring

TIMEOUT_S = 5.0


class Keys(Protocol):
    """The keyring of this node; `gossip.agent.Agent` is that. All raise KeyringError, and OSError when it cannot be kept."""

    def list_keys(self) -> Sequence[KeyView]: ...
    async def install_key(self, secret: bytes) -> str: ...
    async def use_key(self, fingerprint: str) -> None: ...
    async def remove_key(self, fingerprint: str) -> None: ...


class Keyrings:
    """The keyrings of all alive members, ours included. What a node says of its keys is fingerprints."""

    def __init__(self, keys: Keys, members: Members, links: Links) -> None:
        self._ring, self._members, self._links = keys, members, links

    async def handle_peer(self, peer: str, body: Any) -> Any:
        """The peer op `keyring`: [action, key or fingerprint, time left ms] → [[fingerprint, primary, derived] …]."""
        action, argument, _left_ms = body
        return await self._here(action, argument)

    async def apply(self, request: Keyring) -> dict[str, Any]:
        """The action on every alive member. `nodes`: for each its keys, or why it could not.

        Raises RequestError `refused`, and has done nothing then, when an alive member could not follow the next step.
        """
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else TIMEOUT_S
        if request.action == "use":
            self._check_installed(await self._everywhere("list", None, timeout_s), request.fingerprint)
        if request.action == "remove":
            self._check_unused(await self._everywhere("list", None, timeout_s), request.fingerprint)
        argument = request.key if request.action == "install" else request.fingerprint
        return {"nodes": await self._everywhere(request.action, argument, timeout_s)}

    @staticmethod
    def _check_installed(nodes: list[dict[str, Any]], fingerprint: str) -> None:
        without = [
            one["node"]
            for one in nodes
            if fingerprint not in [key["fingerprint"] for key in one.get("keys", ())]
        ]
        if without:
            raise RequestError(
                "refused",
                f"{', '.join(without)} would not be able to read what is sealed with {fingerprint}: install it on every "
                "alive node first",
                "fingerprint",
            )

    @staticmethod
    def _check_unused(nodes: list[dict[str, Any]], fingerprint: str) -> None:
        using = [
            one["node"]
            for one in nodes
            if "keys" not in one or any(k["primary"] and k["fingerprint"] == fingerprint for k in one["keys"])
        ]
        if using:
            raise RequestError(
                "refused",
                f"{', '.join(using)} may still seal with {fingerprint}: use another key on every alive node first",
                "fingerprint",
            )

    async def _everywhere(
        self, action: KeyAction, argument: bytes | str | None, timeout_s: float
    ) -> list[dict[str, Any]]:
        async def one(name: str) -> dict[str, Any]:
            try:
                if name == self._members.own.name:
                    keys = await self._here(action, argument)
                else:
                    link = await self._links.add(name)
                    body = [action, argument, int(timeout_s * 1000)]
                    keys = await link.call("keyring", body, timeout_s)
                shown = [{"fingerprint": k[0], "primary": bool(k[1]), "derived": bool(k[2])} for k in keys]
                return {"node": name, "keys": shown}
            except (KeyringError, RemoteError) as error:
                return {"node": name, "error": error.code, "message": error.message}
            except (PeerError, OSError) as error:
                return {"node": name, "error": "unavailable", "message": str(error)}

        return list((await ask_all(self._members.alive_names, one)).values())

    async def _here(self, action: KeyAction, argument: Any) -> list[tuple[str, bool, bool]]:
        if action == "install":
            await self._ring.install_key(argument)
        elif action == "use":
            await self._ring.use_key(argument)
        elif action == "remove":
            await self._ring.remove_key(argument)
        else:
            await trio.lowlevel.checkpoint()
        return [(key.fingerprint, key.primary, key.derived) for key in self._ring.list_keys()]
