"""Probes, relays and bursts, step by step."""

from __future__ import annotations

from typing import cast

import pytest

from gossip.effects import Effect, Send
from gossip.messages import Ack, Address, Claim, Nack, Ping, PingReq, State
from tests.unit.gossip.machines import HOME, ME, One, alive, home, kinds, said, sent

X, R, S, T = 30, 40, 50, 60
ALIVE, SUSPECT, DOWN, LEFT = State


def until_probed(one: One, target: int) -> Ping:
    """The first ping of the next probe of `target`; `one.now` is when it was sent."""
    for _ in range(10_000):
        for part in sent(one.run(max(0.0, one.machine.next_deadline - one.now)), Ping, home(target)):
            return part
        answer_others(one, target)
    raise AssertionError("never probed")


def answer_others(one: One, silent: int) -> None:
    for probe in list(one.machine._prober._probes.values()):
        if probe.member.id != silent and not probe.answered:
            one.tell(Ack(probe.seq), sender=probe.member.id)


def live(one: One, seconds: float, silent: int) -> list[tuple[float, Effect]]:
    """Time goes on, everybody but `silent` answers at once."""
    until, came = one.now + seconds, []
    while one.machine.next_deadline <= until:
        came += [(one.now, effect) for effect in one.run(one.machine.next_deadline - one.now)]
        answer_others(one, silent)
    one.run(until - one.now)
    return came


def pings_at(came: list[tuple[float, Effect]], seq: int, to: int, *, stream: bool) -> list[float]:
    return [
        at
        for at, one in came
        if isinstance(one, Send) and one.address == home(to) and one.stream is stream
        for part in one.parts
        if isinstance(part, Ping) and part.seq == seq
    ]


# Probes


def test_a_probe_without_an_answer_takes_all_its_steps() -> None:
    one = One(X, R, S, T)
    probe = until_probed(one, X)
    began = one.now
    came = live(one, 1.05, X)
    assert [round(at - began, 2) for at in pings_at(came, probe.seq, X, stream=False)] == [
        0.15,
        0.3,
        0.5,
        0.7,
    ]
    assert [round(at - began, 2) for at in pings_at(came, probe.seq, X, stream=True)] == [0.3]
    asked = [
        (round(at - began, 2), effect.address)
        for at, effect in came
        if isinstance(effect, Send) and PingReq(probe.seq, X, home(X)) in effect.parts
    ]
    assert sorted(asked) == [(0.3, home(id)) for id in (R, S, T)]
    assert [(round(at - began, 2), one.kind) for at, one in came if hasattr(one, "kind")] == [
        (1.0, "suspected")
    ]


@pytest.mark.parametrize("from_relay", [False, True])
def test_an_answer_ends_a_probe(from_relay: bool) -> None:
    one = One(X, R, S, T)
    probe = until_probed(one, X)
    live(one, 0.4, X)
    one.tell(Ack(probe.seq), sender=R if from_relay else X)
    assert "suspected" not in kinds([effect for _, effect in live(one, 0.7, X)])


def test_a_late_answer_clears_the_suspicion() -> None:
    one = One(X, R, S, T)
    probe = until_probed(one, X)
    live(one, 3.0, X)
    assert one.state(X) is SUSPECT
    assert kinds(one.tell(Ack(probe.seq), sender=X)) == ["refuted"]


def test_an_answer_to_a_ping_before_its_restart_says_nothing_about_the_new_process() -> None:
    one = One(X, R, S, T)
    probe = until_probed(one, X)
    one.tell(alive(X, boot=2), said(SUSPECT, X, R, boot=2))
    assert kinds(one.tell(Ack(probe.seq), sender=X)) == []
    assert one.state(X) is SUSPECT


def test_a_failed_probe_of_the_former_process_does_not_accuse_the_new_one() -> None:
    one = One(X, R, S, T)
    until_probed(one, X)
    live(one, 0.9, X)
    one.machine._prober._probing.add(X)  # no further probe in this test
    one.tell(alive(X, boot=2))
    assert "suspected" not in kinds([effect for _, effect in live(one, 0.5, X)])


def test_silent_relays_make_us_doubt_ourselves_and_nacks_do_not() -> None:
    silent, telling = One(X, R, S, T), One(X, R, S, T)
    for one in (silent, telling):
        probe = until_probed(one, X)
        live(one, 0.9, X)
        if one is telling:
            for relay in (R, S):
                one.tell(Nack(probe.seq), sender=relay)
        live(one, 0.15, X)
    assert (silent.machine.statistics()["health"], telling.machine.statistics()["health"]) == (1, 0)


def test_probes_leave_nothing_behind() -> None:
    one = One(X, R, S, T)
    for _ in range(30):
        live(one, 1.0, X)
        one.tell(alive(X, next(m.incarnation for m in one.machine.members() if m.id == X) + 1))
        one.stall(0.3)
    one.tell(*[said(LEFT, id, id, 1_000) for id in (X, R, S, T)])
    one.run(60)
    prober = one.machine._prober
    assert (prober._probes, prober._probing, prober._bursting, prober._relayed) == ({}, set(), {}, {})
    assert len(one.machine._timers) <= 20


def test_a_round_that_is_ahead_is_taken_and_one_that_is_behind_is_not() -> None:
    one = One(X, R, S, T)
    mine = one.machine._prober._round_now(one.now)
    one.tell(Ping(1, ME, (mine - 1) & 0xFFFFFFFF))
    assert one.machine._prober._round_now(one.now) == mine
    one.tell(Ping(1, ME, (mine + 1_000) & 0xFFFFFFFF))
    assert one.machine._prober._round_now(one.now) == (mine + 1_000) & 0xFFFFFFFF


def test_who_calls_the_down_says_its_true_round() -> None:
    """A made-up one would be ahead of everybody's in one half of all rounds."""
    one = One(20, X)
    one.machine._prober._round += 1 << 31
    one.tell(said(SUSPECT, X, 20), said(DOWN, X, 20))
    retries = [part for part in sent(live_effects(one, 20.0, X), Ping, home(X)) if part.seq == 0]
    assert retries
    assert all(part.round >= 1 << 31 for part in retries)


def live_effects(one: One, seconds: float, silent: int) -> list[Effect]:
    return [effect for _, effect in live(one, seconds, silent)]


# Answering and relaying


def test_a_ping_is_answered_when_it_is_for_us() -> None:
    one = One(X)
    assert sent(one.tell(Ping(7, ME, 0), sender=X), Ack, home(X)) == [Ack(7)]
    assert sent(one.tell(Ping(7, 0, 0), sender=X), Ack, home(X)) == [Ack(7)]
    assert sent(one.tell(Ping(7, X, 0), sender=X), Ack) == []


def test_who_pings_us_while_we_suspect_it_hears_of_that() -> None:
    one = One(X, R)
    one.tell(said(SUSPECT, X, R))
    assert said(SUSPECT, X, ME) in sent(one.tell(Ping(7, ME, 0), sender=X), Claim, home(X))


def test_a_relayed_ping_and_its_answer() -> None:
    one = One(X, R)
    ping = sent(one.tell(PingReq(7, X, home(X)), sender=R), Ping, home(X))[0]
    assert sent(one.tell(Ack(ping.seq), sender=X), Ack, home(R)) == [Ack(7)]
    assert sent(one.run(1.0), Nack) == []
    # Once: an answer that is repeated goes nowhere.
    assert sent(one.tell(Ack(ping.seq), sender=X), Ack) == []


def test_a_relayed_ping_without_an_answer_is_said_to_be_so() -> None:
    one = One(X, R)
    one.tell(PingReq(7, X, home(X)), sender=R)
    assert sent(one.run(0.45), Nack) == []
    assert sent(one.run(0.1), Nack, home(R)) == [Nack(7)]


def test_relayed_pings_and_probes_never_share_a_number() -> None:
    one = One(X, R)
    one.machine._prober._seq = 0xFFFFFFFE
    seqs = [sent(one.tell(PingReq(7, X, home(X)), sender=R), Ping, home(X))[0].seq for _ in range(3)]
    seqs.append(until_probed(one, X).seq)
    assert len(set(seqs)) == 4
    assert 0 not in seqs, "0 is for pings whose answer nobody waits for"


def test_relayed_pings_have_a_bound() -> None:
    one = One(X, R)
    for number in range(5_000):
        one.tell(PingReq(number, X, home(X)), sender=R)
    assert len(one.machine._prober._relayed) == 4_096
    one.run(1.0)
    assert len(one.machine._prober._relayed) == 0


def test_a_request_to_relay_to_ourselves_ends_in_a_nack() -> None:
    one = One(X, R)
    ping = sent(one.tell(PingReq(7, ME, HOME), sender=R), Ping, HOME)[0]
    assert one.tell(ping, sender=ME) == []
    assert sent(one.run(0.6), Nack, home(R)) == [Nack(7)]


# Bursts


def test_a_lost_link_starts_a_burst_and_its_failure_a_suspicion() -> None:
    one = One(X, R, S, T)
    one.machine._prober._probing.add(X)  # no probe in this test
    began = one.now
    effects = one.machine.on_link_lost(X, one.now)
    seq = sent(effects, Ping, home(X))[0].seq
    came = [(one.now, effect) for effect in effects] + live(one, 0.5, X)
    assert [round(at - began, 2) for at in pings_at(came, seq, X, stream=False)] == [0.0, 0.1, 0.2, 0.3]
    assert [round(at - began, 2) for at in pings_at(came, seq, X, stream=True)] == [0.0]
    assert len([1 for _, e in came if isinstance(e, Send) and PingReq(seq, X, home(X)) in e.parts]) == 12
    assert kinds([effect for _, effect in came]) == ["suspected"]


@pytest.mark.parametrize("after", [0.0, 0.25, 0.44])
def test_an_answer_ends_a_burst_and_the_next_one_may_begin_at_once(after: float) -> None:
    one = One(X, R, S, T)
    seq = sent(one.machine.on_link_lost(X, one.now), Ping, home(X))[0].seq
    live(one, after, X)
    one.tell(Ack(seq), sender=X)
    again = sent(one.machine.on_link_lost(X, one.now), Ping, home(X))
    assert again
    assert again[0].seq != seq


def test_a_burst_and_a_refused_connection_are_death_without_a_suspicion() -> None:
    one = One(X, R, S, T)
    one.machine.on_link_lost(X, one.now)
    live(one, 0.1, X)
    one.machine.on_stream_failed(home(X), True, one.now)
    assert kinds(live_effects(one, 0.4, X), X) == ["suspected", "down"]


def test_a_refused_connection_alone_is_no_death() -> None:
    one = One(X, R, S, T)
    seq = sent(one.machine.on_link_lost(X, one.now), Ping, home(X))[0].seq
    one.machine.on_stream_failed(home(X), True, one.now)
    one.tell(Ack(seq), sender=R)
    assert kinds(live_effects(one, 0.5, X), X) == []


def test_a_connection_that_is_not_had_for_another_reason_says_nothing() -> None:
    one = One(X, R, S, T)
    one.machine.on_link_lost(X, one.now)
    one.machine.on_stream_failed(home(X), False, one.now)
    assert kinds(live_effects(one, 0.5, X), X) == ["suspected"]


def test_a_probe_whose_connection_is_refused_becomes_a_burst() -> None:
    one = One(X, R, S, T)
    until_probed(one, X)
    live(one, 0.35, X)
    one.machine.on_stream_failed(home(X), True, one.now)
    assert one.machine.statistics()["bursts"] == 1
    one.machine.on_stream_failed(home(X), True, one.now)
    assert one.machine.statistics()["bursts"] == 1
    assert kinds(live_effects(one, 0.5, X), X)[-1] == "down"


@pytest.mark.parametrize("news", [alive(X, 1), alive(X, 0, boot=2)])
def test_a_burst_at_the_former_life_does_not_kill_the_present_one(news: Claim) -> None:
    """The process is started again, and says so, while the ports of the former one refuse us."""
    one = One(X, R, S, T)
    one.machine._prober._probing.add(X)  # no probe in this test
    one.machine.on_link_lost(X, one.now)
    one.machine.on_stream_failed(home(X), True, one.now)
    live(one, 0.35, X)
    one.tell(news)
    assert kinds(live_effects(one, 0.5, X), X) == []
    assert one.state(X) is ALIVE


def test_a_death_has_a_burst_before_it() -> None:
    """`two-evidences`."""
    one = One(X, R, S, T)
    came = live(one, 15.0, X)
    events = [(at, effect) for at, effect in came if hasattr(effect, "kind")]
    assert [cast("str", effect.kind) for _, effect in events] == ["suspected", "down"]  # type: ignore[union-attr]
    assert one.machine.statistics()["failed_bursts"] >= 1
    assert events[1][0] - events[0][0] == pytest.approx(6.0, abs=0.5)


# Stalls


def test_a_stall_voids_the_probes_under_way_and_gives_suspicions_time() -> None:
    """`self-doubt`."""
    one = One(X, R, S, T)
    until_probed(one, X)
    live(one, 0.9, X)
    assert kinds(one.stall(0.5)) == []
    assert one.machine.statistics()["stalls"] == 1
    assert kinds(live_effects(one, 0.2, X), X) == []

    late = One(X, R, S, T)
    late.machine._table.accuse(late.machine._table.members[X], late.now)
    late.tell(*[said(SUSPECT, X, by) for by in (R, S, T)])
    live(late, 0.9, X)
    late.stall(0.5)
    assert "down" not in kinds(live_effects(late, 0.95, X), X)
    assert "down" in kinds(live_effects(late, 0.6, X), X)


def test_a_stall_ends_a_burst_without_a_verdict() -> None:
    one = One(X, R, S, T)
    one.machine.on_link_lost(X, one.now)
    one.machine.on_stream_failed(home(X), True, one.now)
    one.stall(0.6)
    assert "down" not in kinds(live_effects(one, 0.4, X), X)
    assert one.machine.statistics()["failed_bursts"] == 0


# Small and odd clusters


def test_alone_there_is_nobody_to_probe() -> None:
    one = One()
    assert sent(one.run(60), Ping) == []
    assert len(one.machine._timers) <= 10


def test_of_two_the_other_is_declared_by_our_own_evidence() -> None:
    one = One(X)
    assert kinds(live_effects(one, 12.0, X)) == ["suspected", "down"]


def test_a_member_at_our_own_address_is_down_and_does_no_harm() -> None:
    one = One(R, S)
    one.tell(alive(X)._replace(address=HOME))
    for _ in range(2_000):
        for part in sent(one.run(0.01), Ping, HOME):
            assert one.tell(part, sender=ME, source=HOME) == []
        answer_others(one, X)
        if one.state(X) is DOWN:
            break
    assert one.state(X) is DOWN


def test_of_two_at_one_address_the_one_who_is_there_answers() -> None:
    one = One(R, S, T)
    one.tell(alive(X)._replace(address=home(R)))
    came = live_effects(one, 15.0, X)
    assert (one.state(X), one.state(R)) == (DOWN, ALIVE)
    assert kinds(came, R) == []


def test_streams_that_machines_never_asked_for_are_ignored() -> None:
    one = One(X)
    assert one.machine.on_stream_failed(Address("10.1.1.1", 1), True, one.now) == []
    assert one.machine.on_link_lost(999, one.now) == []
