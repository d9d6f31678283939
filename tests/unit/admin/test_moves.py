"""What is shown of moves: one bar, or one line for each stage, from the order to the old replica's end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from admin.moves import _Bars, figures, is_over
from admin.terminal import Output


def move(source: str | None, target: str | None, stage: str, **more: Any) -> dict[str, Any]:
    none = {"percent": None, "bytes": 0, "total_bytes": 0, "bytes_per_s": 0, "eta_s": None, "detail": ""}
    return {"shard": 3, "source": source, "target": target, "stage": stage, **none, **more}


STEPS = [
    [move("a", "d", "queued")],
    [move("a", "d", "copying", percent=41.0), {**move("b", "d", "queued"), "shard": 4}],
    [move("a", "d", "copying", percent=80.0)],
    [],  # its primary is just changing
    [move("a", None, "voting")],
    [move("a", None, "removing")],
    [],
]


def test_a_move_is_one_from_its_order_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with _Bars(Output.TABLE) as bars:
        for step in STEPS:
            bars.show(step)
    assert capsys.readouterr().err.splitlines() == [
        "shard 3: a → d: queued",
        "shard 3: a → d: copying",
        "shard 4: b → d: queued",
        "shard 3: a → d: voting",
        "shard 3: a → d: removing",
    ]


def test_one_that_only_comes_or_only_goes_is_named_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    with _Bars(Output.TABLE) as bars:
        bars.show([move(None, "d", "copying"), move("a", None, "removing")])
    assert capsys.readouterr().err.splitlines() == [
        "shard 3: (one more) → d: copying",
        "shard 3: a lets go of it: removing",
    ]


def test_as_json_each_stage_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with _Bars(Output.JSON) as bars:
        for step in STEPS[:3]:
            bars.show(step)
    told = capsys.readouterr()
    assert not told.err
    assert [json.loads(line)["stage"] for line in told.out.splitlines()] == ["queued", "copying", "queued"]


def test_figures_are_those_that_are_known() -> None:
    assert figures(move("a", "d", "queued")) == ""
    copying = move(
        "a", "d", "copying", percent=41.0, bytes=120e6, total_bytes=290e6, bytes_per_s=49e6, eta_s=3.5
    )
    assert figures(copying) == "41%, 120 MB of 290 MB, 49 MB/s, 3.5 s left"


def test_a_node_is_drained_once_it_witnesses_nothing_either() -> None:
    found: dict[str, Any] = {"moves": [], "unknown": [], "silent": [], "held": {"a": 4}, "layout": {}}
    assert not is_over(found, None, [], "a")
    assert is_over(found, None, [], "w")
    assert not is_over(found | {"witnessed": {"w": 1}}, None, [], "w")
