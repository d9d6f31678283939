"""The command line: exit codes, one-line errors, pure JSON. The client is replaced where an answer is needed."""

from __future__ import annotations

import json
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

    async def status(self) -> dict[str, Any]:
        members = [{"name": "node-1", "state": "alive", "lag_ms": 0}, {"name": "node-2", "state": "down"}]
        return {
            "node": "node-1",
            "cluster": "c",
            "dim": 4,
            "members": members,
            "shards": [{"shard": 0, "role": "primary"}],
        }

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
    async def connect(urls: Sequence[str], *, timeout_s: float) -> AsyncIterator[FakeClient]:
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
    assert answer["coverage"] == {"answered": 11, "total": 12, "missing": [3]}


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


def test_status_shows_members_and_replicas(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status") == 0
    out = capsys.readouterr().out
    assert "node-2" in out
    assert "down" in out
    assert "primary" in out


def test_load_prints_a_summary(fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"media_id": i, "vector": [1, 2, 3, i]}) + "\n" for i in range(30)))
    assert run("load", str(path), "--batch", "7", "--output", "json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["written"], summary["bad"], fake.stored) == (30, 0, 30)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_load_of_another_dimension_fails_at_row_0(
    fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"media_id": 1, "vector": [1, 2]}\n')
    assert run("load", str(path)) == 5
    assert "error[bad_row]: row 0: vector of 2 numbers where the others have 4" in capsys.readouterr().err


def test_nodes_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GMCO_NODES", f"{NOWHERE},ws://127.0.0.1:19")
    assert run("status", "--timeout", "0.3") == 3
    assert NOWHERE in capsys.readouterr().err
