"""What every bench shares: figures as JSON lines, interleaved runs, medians."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller size, under a minute")
    parser.add_argument("--only", help="print just the figures whose name holds this")
    return parser.parse_args()


def interleaved(ours: Callable[[], float], peer: Callable[[], float], runs: int) -> tuple[float, float]:
    """Medians of `runs` measurements of each, taken in turn so that a noisy minute hits both."""
    a, b = [], []
    for _ in range(runs):
        a.append(ours())
        b.append(peer())
    return statistics.median(a), statistics.median(b)


def figure(
    name: str, value: float, unit: str, *, peer: str | None, peer_value: float | None, target: str, n: int
) -> None:
    """One JSON line on stdout. `ratio` is value over peer_value; `target` says what must hold, in words."""
    ratio = round(value / peer_value, 3) if peer_value else None
    line = {
        "figure": name,
        "value": round(value, 3),
        "unit": unit,
        "peer": peer,
        "peer_value": None if peer_value is None else round(peer_value, 3),
        "ratio": ratio,
        "target": target,
        "n": n,
    }
    print(json.dumps(line), flush=True)


def say(text: str) -> None:
    """Progress for people, on stderr, so that stdout stays JSON lines."""
    print(text, file=sys.stderr, flush=True)
