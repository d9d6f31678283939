"""`gmco events --follow`: the events of the cluster as they come, from one node after another.

Who follows gives one node, or some. The others are learnt from it, so that the loss of every given node does not end it.
A loss is told at once. When no known node has answered for `timeout_s`, the error that says why ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import trio

import gmco

WAIT_S = 30.0
# Between two tries, of which the first may have met a node that is still stopping.
PAUSE_S = 0.1
KNOWN_MAX = 64
_NEW_URLS = frozenset({"joined", "returned", "restarted", "moved"})


class Follower:
    """One reader. `show` gets each answer, `say` what a person should know between them."""

    def __init__(
        self,
        urls: Sequence[str],
        timeout_s: float,
        show: Callable[[gmco.Events], None],
        say: Callable[[str], None],
    ) -> None:
        self._urls = list(urls)
        self._timeout_s = timeout_s
        self._show, self._say = show, say
        self._source: tuple[str, int] | None = None
        self._after = 0
        # When the node in use was lost; None while one answers.
        self._lost_at: float | None = None

    async def run(self) -> NoReturn:
        """Raises GmcoError: at first when no node can be reached, later when none has answered for `timeout_s`."""
        while True:
            # One that was there may come back, or another may be about to start.
            wait_s = self._timeout_s if self._source else gmco.WAIT_S
            try:
                async with gmco.connect(self._urls, timeout_s=self._timeout_s, wait_s=wait_s) as client:
                    await self._read(client)
            except (gmco.Unavailable, gmco.DeadlineExceeded) as error:
                if self._source is None:
                    raise
                self._lose(error)
                await trio.sleep(PAUSE_S)

    def _lose(self, error: gmco.GmcoError) -> None:
        """Raises it when there has been no answer for too long."""
        assert self._source is not None
        now = trio.current_time()
        if self._lost_at is None:
            self._lost_at = now
            self._say(
                f"lost {self._source[0]}: {error.message}. "
                f"Trying all nodes known ({len(self._urls)}), for {self._timeout_s:g} s"
            )
        elif now - self._lost_at >= self._timeout_s:
            raise error

    async def _read(self, client: gmco.Client) -> NoReturn:
        known = False
        while True:
            # With another node the first question must not wait: its numbers are not those of the last one.
            wait_s = WAIT_S if self._source and self._lost_at is None else 0.0
            found = await client.events(self._after, wait_s=wait_s)
            self._lost_at = None
            source = (found.node, found.boot)
            if self._source not in (None, source):
                self._say(f"from here on as {found.node} (boot {found.boot}) saw it")
                self._source, self._after = source, 0
                continue
            self._source, self._after = source, found.next
            self._show(found)
            if not known or any(event["kind"] in _NEW_URLS for event in found.events):
                self._learn(await client.status())
                known = True

    def _learn(self, status: dict[str, object]) -> None:
        members = status.get("members")
        for member in members if isinstance(members, list) else ():
            url = member.get("app")
            if (
                url
                and url not in self._urls
                and member.get("state") == "alive"
                and len(self._urls) < KNOWN_MAX
            ):
                self._urls.append(url)
