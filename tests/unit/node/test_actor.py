"""Actors, mailboxes and their supervisor, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from node.actor import ActorGoneError, Mailbox, MailboxFullError
from node.blocking import InlineRunner
from node.supervisor import ActorGaveUpError, RestartPolicy, State, Supervisor


class FatalError(Exception):
    pass


class Adder:
    """Adds up what it is told; "crash", "fatal", "fail", "stop" and "hang" do what they say."""

    def __init__(self, *, capacity: int = 4, recovery_s: float = 0.0) -> None:
        self.mailbox: Mailbox[Any] = Mailbox("adder", capacity)
        self.runs = 0
        self.recovery_s = recovery_s
        self.crash_at_start = False
        self._runner = InlineRunner()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self.runs += 1
        total = 0
        await trio.sleep(self.recovery_s)
        if self.crash_at_start:
            raise OSError("no disk")
        task_status.started()
        while True:
            letter = await self.mailbox.receive()
            match letter.message:
                case "crash":
                    raise RuntimeError("crashed")
                case "fatal":
                    raise FatalError("the disk is gone")
                case "fail":
                    letter.fail(KeyError("unknown"))
                case "stop":
                    return
                case "hang":
                    await trio.sleep_forever()
                case number:
                    total = await self._runner(sum, (total, number))
                    letter.reply(total)


def simulate(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        # In virtual time: who hangs jumps here at once.
        with trio.fail_after(100_000):
            await test()

    with structlog.testing.capture_logs():
        trio.run(bounded, clock=MockClock(autojump_threshold=0))


def supervisor_in(nursery: trio.Nursery, **policy: Any) -> Supervisor:
    return Supervisor(nursery, policy=RestartPolicy(**policy), jitter=random.Random(1))


def test_asks_are_answered_in_order_and_errors_carried() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            with pytest.raises(ActorGoneError):
                await adder.mailbox.ask(1)
            supervisor = supervisor_in(nursery)
            await supervisor.start(adder, name="adder")
            assert supervisor.state("adder") is State.RUNNING
            adder.mailbox.tell(5)
            assert await adder.mailbox.ask(1) == 6
            with pytest.raises(KeyError):
                await adder.mailbox.ask("fail")
            assert await adder.mailbox.ask(1) == 7
            nursery.cancel_scope.cancel()
        assert supervisor.state("adder") is State.STOPPED
        with pytest.raises(ActorGoneError):
            await adder.mailbox.ask(1)

    simulate(main)


def test_start_waits_for_recovery() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            await supervisor_in(nursery).start(Adder(recovery_s=30), name="adder")
            assert trio.current_time() - began == pytest.approx(30)
            nursery.cancel_scope.cancel()

    simulate(main)


def test_a_crash_before_ready_is_raised_by_start() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            adder.crash_at_start = True
            with pytest.raises(OSError, match="no disk"):
                await supervisor_in(nursery).start(adder, name="adder")

    simulate(main)


def test_a_full_mailbox_refuses_and_counts() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder(capacity=2)
            supervisor = supervisor_in(nursery)
            await supervisor.start(adder, name="adder")
            adder.mailbox.tell("hang")
            await wait_all_tasks_blocked()
            adder.mailbox.tell(1)
            adder.mailbox.tell(1)
            with pytest.raises(MailboxFullError):
                adder.mailbox.tell(1)
            (one,) = supervisor.statistics()
            assert one.mailbox is not None
            assert (one.mailbox.waiting, one.mailbox.refused, one.mailbox.taken) == (2, 1, 1)
            nursery.cancel_scope.cancel()

    simulate(main)


def test_who_asks_an_actor_that_dies_is_told_at_once() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            supervisor = supervisor_in(nursery)
            await supervisor.start(adder, name="adder")
            told: list[str] = []

            async def ask(message: Any) -> None:
                with pytest.raises(ActorGoneError) as caught:
                    await adder.mailbox.ask(message)
                told.append(str(caught.value))

            began = trio.current_time()
            async with trio.open_nursery() as askers:
                # The letter that kills, and those behind it.
                for message in ("crash", "crash", "crash"):
                    askers.start_soon(ask, message)
            assert len(told) == 3
            assert all("crashed" in one for one in told)
            assert trio.current_time() == began
            with pytest.raises(ActorGoneError):
                adder.mailbox.tell(1)
            # Back after the pause, with a state of its own.
            await trio.sleep(1)
            assert await adder.mailbox.ask(2) == 2
            assert adder.runs == 2
            nursery.cancel_scope.cancel()

    simulate(main)


def test_an_asker_that_gives_up_is_forgotten() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            await supervisor_in(nursery).start(adder, name="adder")
            with trio.move_on_after(1) as scope:
                await adder.mailbox.ask("hang")
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()
        adder.mailbox.close()

    simulate(main)


def test_pauses_grow_and_too_many_crashes_end_the_process() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            supervisor = supervisor_in(nursery, crashes_max=3, backoff_min_s=1.0, backoff_max_s=3.0)
            await supervisor.start(adder, name="adder")
            for pause_s in (1.0, 2.0, 3.0, None):
                adder.mailbox.tell("crash")
                await wait_all_tasks_blocked()
                if pause_s is None:
                    await trio.sleep_forever()
                assert supervisor.state("adder") is State.BACKOFF
                await trio.sleep(pause_s * 0.49)
                assert supervisor.state("adder") is State.BACKOFF
                await trio.sleep(pause_s * 0.52)
                assert supervisor.state("adder") is State.RUNNING

    with pytest.raises(ExceptionGroup) as caught:
        simulate(main)
    (error,) = caught.value.exceptions
    assert isinstance(error, ActorGaveUpError)
    assert str(error) == "adder crashed 4 times within 60 s; last: RuntimeError: crashed"


def test_rare_crashes_are_forgiven() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            supervisor = supervisor_in(nursery, crashes_max=1, window_s=60.0)
            await supervisor.start(adder, name="adder")
            for _ in range(10):
                adder.mailbox.tell("crash")
                await trio.sleep(61)
            assert supervisor.statistics()[0].crashes == 10
            nursery.cancel_scope.cancel()

    simulate(main)


def test_a_fatal_error_is_not_tried_again() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            await supervisor_in(nursery, fatal=(FatalError,)).start(adder, name="adder")
            adder.mailbox.tell("fatal")
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        simulate(main)
    assert str(caught.value.exceptions[0]) == "adder cannot go on: FatalError: the disk is gone"


def test_an_actor_may_finish() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            adder = Adder()
            supervisor = supervisor_in(nursery)
            await supervisor.start(adder, name="adder")
            with pytest.raises(ActorGoneError, match="finished"):
                await adder.mailbox.ask("stop")
            assert supervisor.state("adder") is State.STOPPED

    simulate(main)


def test_letters_are_taken_in_batches() -> None:
    async def main() -> None:
        box: Mailbox[int] = Mailbox("box", 10)
        box.open()
        for number in range(5):
            box.tell(number)
        assert [letter.message for letter in await box.receive_many(3)] == [0, 1, 2]
        assert [letter.message for letter in await box.receive_many(3)] == [3, 4]

    simulate(main)
