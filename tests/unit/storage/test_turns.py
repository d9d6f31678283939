"""Turns: nobody waits for ever, however late a thread that was woken comes to run."""

from __future__ import annotations

import threading

from storage.index.turns import Turns


def test_an_impatient_builder_and_searches_that_wait_for_it_all_get_their_turn() -> None:
    turns = Turns(patience_s=0.0)
    stop = threading.Event()
    searched = []

    def search() -> None:
        while not stop.is_set():
            with turns.search():
                searched.append(1)

    def build() -> None:
        for _ in range(500):
            with turns.build():
                pass

    threads = [threading.Thread(target=search, daemon=True) for _ in range(2)]
    builder = threading.Thread(target=build, daemon=True)
    for thread in (*threads, builder):
        thread.start()
    builder.join(30)
    stuck = builder.is_alive()
    stop.set()
    assert not stuck
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert searched
