"""`gmco repair`: what it prints and its exit codes. The client is replaced."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import Any

import pytest

import gmco
from admin import cli

EQUAL = {"shard": 0, "primary": "a", "epoch": 2, "sequence": 40, "replicas": {"b": "equal", "c": "repaired"}, "equal": True,
         "problem": "", "written": 2, "taken": 0, "mended": 0, "dropped": 0, "set_aside": 0, "lost": 0}  # fmt: skip


class FakeClient:
    def __init__(self, answers: list[dict[str, Any] | gmco.GmcoError]) -> None:
        self.answers = answers

    async def status(self) -> dict[str, Any]:
        return {"shard_count": len(self.answers)}

    async def repair(self, shard: int, *, timeout_s: float) -> dict[str, Any]:
        answer = self.answers[shard]
        if isinstance(answer, gmco.GmcoError):
            raise answer
        return {**answer, "shard": shard}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    held: list[Any] = []

    @asynccontextmanager
    async def connect(*_: Any, **__: Any) -> Any:
        yield FakeClient(held)

    monkeypatch.setattr(gmco, "connect", connect)
    return held


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["repair", *arguments])
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"replicas": {"b": "equal", "c": "silent"}, "equal": False}, 8),
        ({"replicas": {"b": "equal", "c": "behind"}, "equal": False}, 8),
        ({"replicas": {}, "problem": "the primary has no lease", "equal": False}, 8),
        ({"replicas": {"b": "equal", "c": "differs"}, "equal": False, "lost": 1}, 4),
    ],
)
def test_exit_codes(answers: list[Any], change: dict[str, Any], code: int) -> None:
    answers.append({**EQUAL, **change})
    assert run("0") == code


def test_all_goes_on_where_one_shard_has_no_primary(
    answers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers += [EQUAL, gmco.Unavailable("no_primary", "nobody leads shard 1 now"), EQUAL]
    assert run("--all", "--output", "json") == 8
    found = json.loads(capsys.readouterr().out)
    assert [one["equal"] for one in found] == [True, False, True]
    assert found[1]["problem"].startswith("no_primary: ")


def test_the_table_says_what_was_done(answers: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    answers.append(EQUAL)
    assert run("0") == 0
    out = capsys.readouterr().out
    assert "c repaired" in out
    assert "2 written" in out


@pytest.mark.parametrize("arguments", [[], ["1", "--all"]])
def test_one_shard_or_all(answers: list[Any], arguments: list[str]) -> None:
    assert run(*arguments) == 2
