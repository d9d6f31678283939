"""What holds the house together and no linter sees: the public module's imports, and whose the top-level names are."""

from __future__ import annotations

import ast
import re
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = {"admin", "gossip", "node", "router", "storage"}


def test_gmco_imports_none_of_ours() -> None:
    tree = ast.parse((ROOT / "gmco.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "gmco is one file"
            names.add((node.module or "").split(".")[0])
    assert not names & OURS


def test_each_law_of_the_docs_is_named_in_a_test() -> None:
    """Where docs/ states a law by name, a test says which it shows; so none is only promised."""
    laws: dict[str, str] = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        inside = False
        for line in page.read_text().splitlines():
            inside = line.startswith("|") and (inside or line.startswith("| name | says |"))
            found = re.match(r"\| `([a-z0-9-]+)` \|", line)
            if inside and found:
                laws[found[1]] = page.name
    assert len(laws) > 50, "the tables of laws were not found"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert not {law: page for law, page in laws.items() if f"`{law}`" not in tests}


def test_each_installed_top_level_name_belongs_to_this_distribution() -> None:
    owners = packages_distributions()
    ours = (distribution("gmco").read_text("top_level.txt") or "").split()
    assert {*OURS, "gmco"} <= set(ours)
    for name in ours:
        assert set(owners.get(name, ["gmco"])) == {"gmco"}, f"{name} is installed by {owners[name]}, too"
