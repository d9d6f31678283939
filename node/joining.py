"""What a node brings to the others: gossip's keys and agent, and what it says of itself."""

from __future__ import annotations

import os
import random
from importlib.metadata import version

import structlog

from gossip import keyfile
from gossip.agent import Agent
from gossip.config import GossipConfig
from gossip.keyring import Keyring
from gossip.messages import Address as GossipAddress
from node.config import Address, Config
from node.facts import NodeFact
from node.identity import DataDirectory
from node.peerlink import Hello

log = structlog.get_logger(__name__)


def make_agent(config: Config, directory: DataDirectory) -> Agent:
    """Not bound yet. Reads the keyring, or makes it of `gossip.key` at the first start. Raises KeyringError, OSError."""
    settings = config.gossip
    path = directory.path / "keyring"
    keys = keyfile.load(path)
    if keys is None and settings.secret is not None:
        keys = [settings.secret]
        keyfile.save(path, keys)
    elif settings.secret is not None and settings.secret not in (keys or []):
        log.warning("keyring", message=f"gossip.key is not used: {path} counts, and does not hold it")
    advertise = settings.advertised
    return Agent(
        GossipConfig(udp=settings.udp),
        id=directory.identity.member_id,
        boot=directory.identity.boots,
        keyring=Keyring(config.cluster.id, keys or [], random_bytes=os.urandom),
        listen=Address(config.listen.host, config.listen.peer_port),
        advertise=GossipAddress(*advertise) if advertise is not None else None,
        seeds=config.cluster.seeds,
        random=random.Random(),
        keys_path=path,
    )


def node_fact(config: Config, reached_at: str) -> NodeFact:
    """reached_at: the host by which others know this node, when it listens on all addresses."""
    node, cluster, storage, listen = config.node, config.cluster, config.storage, config.listen
    host = reached_at if listen.host in ("0.0.0.0", "::") else listen.host  # noqa: S104 - compared, not bound
    return NodeFact(
        name=node.name,
        region=node.region,
        zone=node.zone,
        host=node.host,
        capacity=0 if node.witness else node.capacity,
        app=listen.app_url or f"ws://{Address(host, listen.app_port)}",
        http=_http(config, host),
        version=version("gmco"),
        shard_count=cluster.shard_count,
        replication=cluster.replication,
        dim=storage.dim,
        metric=storage.metric,
        class_width=storage.class_width,
        bootstrap=cluster.bootstrap,
    )


def _http(config: Config, host: str) -> str:
    listen = config.listen
    # A port that the system gives is not known yet.
    if not config.http.enabled or not (listen.http_url or listen.http_port):
        return ""
    return listen.http_url or f"http://{Address(host, listen.http_port)}"


def hello(config: Config, boot: int) -> Hello:
    """What both ends of a link to this node must agree on, and who speaks."""
    return Hello(
        cluster=config.cluster.id,
        node=config.node.name,
        shard_count=config.cluster.shard_count,
        dim=config.storage.dim,
        metric=config.storage.metric,
        class_width=config.storage.class_width,
        boot=boot,
    )
