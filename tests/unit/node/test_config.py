"""The configuration file: what is taken, and that each refusal names the key and what would be right."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from node.config import Address, ConfigError, load, parse, parse_address
from storage.config import StorageConfig

MINIMAL = '[node]\nname = "a"\n'
THREE = (
    MINIMAL
    + """
[cluster]
id = "c1"
[[cluster.members]]
name = "a"
peer = "10.0.0.1:7402"
region = "eu"
capacity = 2
[[cluster.members]]
name = "b"
peer = "[fd00::2]:7402"
app = "ws://10.0.0.2:7400"
[[cluster.members]]
name = "c"
peer = "c.example:7402"
"""
)


def test_minimal_file_is_a_cluster_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(MINIMAL)
    config = load(path)
    assert config.node.data_dir == tmp_path / "data"
    assert config.node.host == "a"
    assert config.storage == StorageConfig()
    (me,) = config.cluster.members
    assert (me.name, me.peer, me.app) == ("a", "127.0.0.1:7402", "ws://127.0.0.1:7400")
    assert config.cluster.id == "single-a"
    assert any("replication is 3" in warning for warning in config.warnings)


def test_members_give_this_node_its_place() -> None:
    config = parse(THREE)
    assert (config.node.region, config.node.capacity) == ("eu", 2)
    assert [member.host for member in config.cluster.layout_members()] == ["a", "b", "c"]
    assert config.cluster.member("b").peer_address == Address("fd00::2", 7402)
    assert config.warnings == ()


def test_storage_takes_the_fields_of_its_own_dataclass() -> None:
    config = parse(MINIMAL + '[storage]\ndim = 64\nengine = "exact"\ncompact_dead_ratio = 1\n')
    assert (config.storage.dim, config.storage.engine) == (64, "exact")
    assert isinstance(config.storage.compact_dead_ratio, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "[node]: missing"),
        ("[node]\n", "node.name: missing"),
        ('[node]\nname = "a b"\n', 'node.name: "a b" must be'),
        ('[node]\nname = "../x"\n', "node.name:"),
        (MINIMAL + "[storage]\ndmi = 3\n", 'storage.dmi: unknown key; did you mean "dim"?'),
        (MINIMAL + "[storge]\n", 'storge: unknown section; did you mean "storage"?'),
        (MINIMAL + "[warnings]\n", "warnings: unknown section"),
        (MINIMAL + '[storage]\ndim = "64"\n', 'storage.dim: must be a whole number, is a string ("64")'),
        (MINIMAL + "[storage]\nthreads = true\n", "storage.threads: must be a whole number, is a boolean"),
        (MINIMAL + "[storage]\ndim = 64.0\n", "storage.dim: must be a whole number"),
        (MINIMAL + "[storage]\nwal_keep_s = nan\n", "storage.wal_keep_s: must be a number"),
        (MINIMAL + "[storage]\nclass_width = 100\n", "storage.class_width: must be a multiple of 64, is 100"),
        (MINIMAL + "[storage]\nclass_width = 2048\n", "storage.class_width: must be from 64 to 1,024"),
        (MINIMAL + '[storage]\nengine = "faiss"\n', 'must be one of "exact", "hnsw", "hnsw16"; is "faiss"'),
        (MINIMAL + "[listen]\napp_port = 65536\n", "listen.app_port: must be from 0 to 65,535, is 65,536"),
        (MINIMAL + '[log]\nlevel = "loud"\n', "log.level: must be one of"),
        (MINIMAL + "log = 3\n", "node.log: unknown key"),
        ("log = 3\n" + MINIMAL, "log: must be a table, is a whole number"),
        (MINIMAL + "[cluster]\nmembers = 3\n", "cluster.members: must be a list"),
        (MINIMAL + '[cluster]\nid = "c"\nmembers = [{name = "a"}]\n', "cluster.members[0].peer: missing"),
        (MINIMAL + '[cluster]\nmembers = [{name = "a", peer = "h:1"}]\n', "cluster.id: missing"),
        (
            MINIMAL + '[cluster]\nid = "c"\nmembers = [{name = "b", peer = "h:1"}]\n',
            'node.name: "a" is not in cluster.members (b)',
        ),
        (
            THREE.replace('"[fd00::2]:7402"', '"fd00::2:7402"'),
            "cluster.members[1].peer: an IPv6 address needs",
        ),
        (THREE.replace("ws://10", "http://10"), "cluster.members[1].app: must begin with ws://"),
        (THREE.replace('"b"', '"c"'), 'cluster.members[2].name: "c" is already cluster.members[1].name'),
        (THREE.replace('name = "a"\n\n', 'name = "a"\nregion = "us"\n\n', 1), "node.region: is 'us' but"),
        ("[node", "not valid TOML:"),
    ],
)
def test_refusals_name_the_key(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load(tmp_path / "absent.toml")
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bad\.toml: cannot be read: not UTF-8"):
        load(path)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:-1", "host:99999", "a:b:1", "host:١"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|needs brackets"):
        parse_address(text)


def test_example_shows_the_defaults() -> None:
    text = (Path(__file__).parents[3] / "examples" / "node.toml").read_text()
    assert tomllib.loads(text)["node"]["name"] == "node-1"
    plain = parse('[node]\nname = "node-1"\n')
    assert parse(text) == plain
    # Uncommented, every shown default must be a known key with the default's value.
    shown = "\n".join(
        line[1:] if line.startswith("#") and " = " in line else line for line in text.splitlines()
    )
    shown = shown.split("# --- members ---")[0]
    assert parse(shown) == plain
    for section in ("listen", "storage", "limits", "log"):
        keys = set(tomllib.loads(shown)[section])
        assert keys == {one.name for one in dataclasses.fields(getattr(plain, section))}
