"""Turns: nobody waits for ever, however late a thread that was woken comes to run."""

from __future__ import annotations

import threading
import time

from storage.index.turns import Turns


def test_a_builder_out_of_patience_does_not_wait_for_a_search_that_waits_for_it() -> None:
    turns = Turns(patience_s=0.0)
    searched = threading.Event()

    def search() -> None:
        with turns.search():
            searched.set()

    def build_twice() -> None:
        first = turns.build()
        first.__enter__()
        threading.Thread(target=search, daemon=True).start()
        while not turns._wanting:
            time.sleep(0.001)
        with turns._condition:  # the search is woken, and does not come to run before the next build
            first.__exit__(None, None, None)
            with turns.build():
                pass

    builder = threading.Thread(target=build_twice, daemon=True)
    builder.start()
    builder.join(20)
    assert not builder.is_alive()
    assert searched.wait(20)
