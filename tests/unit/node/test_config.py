"""The configuration file: what is taken, and that each refusal names the key and what would be right."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from node.config import Address, ConfigError, load, parse, parse_address
from storage.config import StorageConfig

MINIMAL = '[node]\nname = "a"\n'
KEY = "0f" * 32
THREE = (
    MINIMAL
    + """
[cluster]
id = "c1"
seeds = ["10.0.0.1:7402", "[fd00::2]:7402", "c.example:7402"]
bootstrap = 3
"""
)


def test_minimal_file_is_a_cluster_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(MINIMAL)
    config = load(path)
    assert config.node.data_dir == tmp_path / "data"
    assert config.node.host == "a"
    assert config.storage == StorageConfig()
    assert config.cluster.alone
    assert config.cluster.id == "single-a"
    assert any("replication is 3" in warning for warning in config.warnings)


def test_seeds_and_bootstrap_make_a_cluster() -> None:
    config = parse(THREE)
    assert not config.cluster.alone
    assert [parse_address(seed).port for seed in config.cluster.seeds] == [7402] * 3
    assert config.warnings == ()


def test_a_key_is_read_and_never_shown() -> None:
    assert parse(f'{THREE}[gossip]\nkey = "{KEY}"\n').gossip.secret == bytes.fromhex(KEY)
    assert parse(THREE).gossip.secret is None
    with pytest.raises(ConfigError) as caught:
        parse(f'{THREE}[gossip]\nkey = "{KEY}0"\n')
    assert KEY not in str(caught.value)
    assert parse(f'{THREE}[gossip]\nadvertise = "[::1]:7"\n').gossip.advertised == Address("::1", 7)


def test_beyond_loopback_a_cluster_without_a_key_is_warned(tmp_path: Path) -> None:
    text = THREE + '[listen]\nhost = "0.0.0.0"\n'
    assert "gossip.key" in parse(text, folder=tmp_path).warnings[-1]
    assert parse(text + f'[gossip]\nkey = "{KEY}"\n').warnings == ()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keyring").touch()
    assert parse(text, folder=tmp_path).warnings == ()


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
        (MINIMAL + '[cache]\nredis = "localhost:1"\n', "cache.redis: must begin with redis://"),
        (MINIMAL + '[cache]\nredis = "redis://h:x"\n', "cache.redis: its port must be a number"),
        (MINIMAL + '[cache]\nredis_cluster = ["h"]\n', 'cache.redis_cluster[0]: must be "host:port"'),
        (
            MINIMAL + '[cache]\nredis = "redis://h"\nredis_cluster = ["h:1"]\n',
            "cache.redis_cluster: give either this or cache.redis",
        ),
        ("log = 3\n" + MINIMAL, "log: must be a table, is a whole number"),
        (MINIMAL + "[cluster]\nseeds = 3\n", "cluster.seeds: must be a list"),
        (MINIMAL + "[[cluster.members]]\n", "cluster.members: unknown key"),
        (MINIMAL + '[cluster]\nid = "c"\nseeds = ["h:1"]\n', "cluster.bootstrap: with seeds, give how many"),
        (MINIMAL + "[cluster]\nbootstrap = 3\n", "cluster.id: missing"),
        (THREE.replace("[fd00::2]:7402", "fd00::2:7402"), "cluster.seeds[1]: an IPv6 address needs"),
        (MINIMAL + '[listen]\napp_url = "http://10"\n', "listen.app_url: must begin with ws://"),
        (MINIMAL + '[gossip]\nadvertise = "10.0.0.1"\n', "gossip.advertise: must be"),
        (MINIMAL + '[gossip]\nkey = "abc"\n', "gossip.key: must be 64 hex digits"),
        (MINIMAL + '[gossip]\nudp = "never"\n', 'gossip.udp: must be one of "auto", "on", "off"'),
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
    assert parse(shown) == plain
    for section in ("listen", "cluster", "gossip", "storage", "limits", "repair", "log"):
        keys = set(tomllib.loads(shown)[section])
        assert keys == {one.name for one in dataclasses.fields(getattr(plain, section))}


def test_the_configurations_of_the_readme_are_good_and_give_no_warning() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    alone, three, cached = (block.split("```")[0] for block in text.split("```toml\n")[1:])
    assert parse(alone).warnings == ()
    assert parse(alone).cluster.replication == 1
    before, after = alone.split("[cluster]\nreplication = 1\n")
    keyed = three.replace('"…"', f'"{"ab" * 32}"')
    formed = parse(before + after + keyed)
    assert formed.warnings == ()
    assert (formed.cluster.replication, formed.cluster.bootstrap) == (3, 3)
    # An addition to either.
    for whole in (alone, before + after + keyed):
        with_redis = parse(whole + cached)
        assert with_redis.warnings == ()
        assert with_redis.cache.redis.startswith("redis://")
