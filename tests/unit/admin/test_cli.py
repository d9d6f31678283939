"""The command line: exit codes, one-line errors, pure JSON. The client is replaced where an answer is needed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import gmco
from admin import cli

NOWHERE = "ws://127.0.0.1:9"  # the discard port: nobody listens


class FakeClient:
    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.error: gmco.GmcoError | None = None
        self.stored = 0
        self.answers: list[gmco.Events] = []
        self.afters: list[int] = []
        self.keyrings: list[dict[str, Any]] = []

    async def status(self) -> dict[str, Any]:
        members = [
            {"name": "node-1", "state": "alive", "lag_ms": 0, "load": {"queued": 3.0, "batch_ms": 1.5}},
            {"name": "node-2", "state": "down", "heard_ms": 4_000_000, "degraded": "a [bad] disk"},
        ]
        return {
            "node": "node-1",
            "cluster": "c",
            "dim": 4,
            "state": "ready",
            "problems": ["name_conflict: two"],
            "members": members,
            "shards": [{"shard": 0, "role": "primary"}],
        }

    async def forget_node(self, node: str) -> None:
        self.asked = {"node": node}
        if self.error:
            raise self.error

    async def events(self, after: int = 0, *, wait_s: float = 0.0) -> gmco.Events:
        self.afters.append(after)
        if not self.answers:
            assert self.error is not None
            raise self.error
        return self.answers.pop(0)

    async def keyring(self, action: str, **given: Any) -> list[dict[str, Any]]:
        self.asked = {"action": action, **given}
        return self.keyrings

    async def recommend(self, user_id: int, k: int, **fields: Any) -> gmco.Answer:
        self.asked = {"user_id": user_id, "k": k, **fields}
        if self.error:
            raise self.error
        hits = [gmco.Hit(7, 0.5, {"title": "Été [bold]", "year": 1999, "genres": ["Drama"]})]
        return gmco.Answer(hits, gmco.Coverage(11, 12, (3,)))

    async def similar(self, **fields: Any) -> gmco.Answer:
        self.asked = fields
        return gmco.Answer([], gmco.Coverage(12, 12))

    async def get_items(self, ids: Sequence[int], *, vector: bool) -> list[gmco.Record | None]:
        return [gmco.Record(id, (1, 2), (3,), {"title": "x"}) if id < 10 else None for id in ids]

    async def put_items(self, items: Sequence[gmco.Item], *_: Any, **__: Any) -> gmco.Written:
        self.stored += len(items)
        return gmco.Written(len(items), (), b"")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient()

    @asynccontextmanager
    async def connect(urls: Sequence[str], **limits: float) -> AsyncIterator[FakeClient]:
        yield client

    monkeypatch.setattr(gmco, "connect", connect)
    return client


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("gmco ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "error[usage]: No such command"),
        (["recommend", "x"], 2, "error[usage]: Invalid value"),
        (["recommend", "1", "-k", "0"], 2, "error[usage]: Invalid value"),
        (["status", "--node", "http://x"], 2, "error[bad_url]"),
        (["recommend", "1", "--any", "Nonsense"], 2, "error[unknown_class]"),
        (["load", "absent.parquet"], 2, "error[bad_file]"),
        (["status", "--node", NOWHERE, "--timeout", "0.3"], 3, "error[unavailable]"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_a_node_that_is_silent_is_a_timeout_and_one_that_is_away_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the system takes the connection, and nobody answers
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        assert run("status", "--node", url, "--timeout", "0.2") == 7
        assert capsys.readouterr().err.startswith("error[deadline_exceeded]: no node can be reached: ws://")
    begin = time.monotonic()
    assert run("status", "--node", NOWHERE) == 3
    assert time.monotonic() - begin < 2
    assert capsys.readouterr().err == (
        f"error[unavailable]: no node can be reached: {NOWHERE}: connection refused\n"
    )


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["nonsense"], "gmco"),
        (["load"], "gmco load"),
        (["nodes", "--nope"], "gmco nodes"),
        (["nodes", "forget"], "gmco nodes forget"),
        (["get", "item", "x"], "gmco get item"),
    ],
)
def test_wrong_usage_points_to_the_help_of_the_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], command: str
) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err.endswith(f" (see {command} --help)\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (gmco.Overloaded("overloaded", "later"), 4),
        (gmco.GmcoError("disk_full", "no room"), 4),
        (gmco.NotFound("unknown_user", "who?"), 6),
        (gmco.DeadlineExceeded("deadline_exceeded", "slow"), 7),
        (gmco.BadRequest("out_of_range", "class", "require_any"), 2),
    ],
)
def test_the_clusters_errors_have_exit_codes(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], error: gmco.GmcoError, code: int
) -> None:
    fake.error = error
    assert run("recommend", "1") == code
    assert capsys.readouterr().err.startswith(f"error[{error.code}]: {error.message}")


def test_json_is_pure_and_whole(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("recommend", "4", "-k", "3", "--any", "comedy", "--any", "200", "--exclude", "R", "-o", "json")
        == 0
    )
    assert fake.asked == {"user_id": 4, "k": 3, "require_all": [], "require_any": [5, 200], "exclude": [43]}
    answer = json.loads(capsys.readouterr().out)
    assert answer["hits"][0]["metadata"]["title"] == "Été [bold]"
    assert answer["coverage"] == {"answered": 11, "total": 12, "missing": [3], "reason": ""}


def test_a_partial_answer_says_so(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recommend", "4") == 0
    out, err = capsys.readouterr()
    assert "Été [bold] (1999)" in out
    assert "11 of 12 shards answered; missing: 3" in err


def test_similar_takes_several_and_some_to_avoid(fake: FakeClient) -> None:
    assert run("similar", "1", "2", "--not", "3", "--not", "4", "-k", "5") == 0
    assert (fake.asked["positive"], fake.asked["negative"], fake.asked["k"]) == ([1, 2], [3, 4], 5)


def test_get_names_what_is_absent(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("get", "item", "1", "99", "--output", "json") == 6
    out, err = capsys.readouterr()
    assert [record and record["id"] for record in json.loads(out)] == [1, None]
    assert err == "error[unknown_item]: no such item: 99\n"


def test_status_shows_the_node_and_its_replicas(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status") == 0
    out = capsys.readouterr().out
    assert "ready, sees 1 of 2 members alive" in out
    assert "name_conflict: two" in out
    assert "primary" in out


def test_nodes_shows_the_members_and_what_is_wrong_with_them(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("admin.show.out.width", 200)
    assert run("nodes") == 0
    out = capsys.readouterr().out
    for said in ("node-2", "down", "67 min", "3 queued, 1.5 ms", "a [bad] disk"):
        assert said in out
    assert run("nodes", "--output", "json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["node-1", "node-2"]


def test_forget_names_the_node(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nodes", "forget", "node-2") == 0
    assert fake.asked == {"node": "node-2"}
    fake.error = gmco.GmcoError("refused", "node-2 is alive; stop it first")
    assert run("nodes", "forget", "node-2") == 4
    assert capsys.readouterr().err == "error[refused]: node-2 is alive; stop it first\n"


def test_events_are_lines_and_begin_anew_with_another_node(
    fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"sequence": 1, "at": 0.5, "kind": "down", "node": "node-2", "by": "node-3"}
    fake.answers = [gmco.Events("node-1", 4, (event,), 1, 0)]
    assert run("events") == 0
    assert "node-2               down, says node-3" in capsys.readouterr().out
    fake.answers = [
        gmco.Events("node-1", 4, (event,), 7, 2),
        gmco.Events("node-3", 1, (event,), 9, 0),
        gmco.Events("node-3", 1, (event,), 1, 0),
    ]
    fake.error = gmco.Unavailable("unavailable", "gone")
    assert run("events", "--follow", "--output", "json", "--timeout", "0.2") == 3
    out, err = capsys.readouterr()
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["down", "down"]
    assert "2 events are forgotten" in err
    assert "as node-3 (boot 1) saw it" in err
    assert "lost node-3: gone" in err
    assert err.endswith("error[unavailable]: gone\n")
    assert fake.afters[:5] == [0, 0, 7, 0, 1]


def test_keys_are_read_from_files_and_shown_as_fingerprints(
    fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("keyring", "generate") == 0
    key = capsys.readouterr().out
    assert len(bytes.fromhex(key)) == 32
    path = tmp_path / "key"
    path.write_text(key)
    fake.keyrings = [{"node": "node-1", "keys": [{"fingerprint": "ab", "primary": True, "derived": True}]}]
    assert run("keyring", "install", str(path)) == 0
    assert fake.asked == {"action": "install", "key": bytes.fromhex(key)}
    out = capsys.readouterr().out
    assert "ab (derived)" in out
    assert key.strip() not in out
    path.write_text(key[:-3])
    assert run("keyring", "install", str(path)) == 2
    assert key[:9] not in capsys.readouterr().err
    fake.keyrings.append({"node": "node-2", "error": "ring_full", "message": "the keyring holds 8 keys"})
    assert run("keyring", "use", "ab") == 4
    out, err = capsys.readouterr()
    assert "the keyring holds 8 keys" in out
    assert err == "error[refused]: not done on node-2; the others have: try again\n"


def test_load_prints_a_summary(fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"media_id": i, "vector": [1, 2, 3, i]}) + "\n" for i in range(30)))
    assert run("load", str(path), "--batch", "7", "--output", "json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["written"], summary["bad"], fake.stored) == (30, 0, 30)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_load_counts_lines_from_1(
    fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"media_id": 1, "vector": [1, 2, 3, 4]}\n\n{}\n')
    assert run("load", str(path), "--skip-bad") == 0
    assert capsys.readouterr().err == "line 3: no media_id\n"
    assert run("load", str(path), "--skip-bad", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["bad_rows"] == [{"row": 3, "reason": "no media_id"}]


def test_load_of_another_dimension_fails_at_line_1_and_leaves_nothing(
    fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"media_id": 1, "vector": [1, 2]}\n')
    assert run("load", str(path)) == 5
    assert "error[bad_row]: line 1: vector of 2 numbers where the others have 4" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_nodes_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GMCO_NODES", f"{NOWHERE},ws://127.0.0.1:19")
    assert run("status", "--timeout", "0.3") == 3
    assert NOWHERE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["set", "node-1", "colour=red"], "region=… or zone=… or host=… or capacity=…"),
        (["set", "zone=a"], "replication=…"),
        (["set", "node-1", "capacity=big"], "capacity is a whole number"),
        (["recover"], "--force"),
    ],
)
def test_what_cluster_does_not_take_is_said_before_anybody_is_asked(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["cluster", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
