"""`gmco-node run CONFIG` and `gmco-node check-config CONFIG`. What goes wrong at start is one line and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import gc
import sys
from importlib.metadata import version

import structlog
import trio
from threadpoolctl import threadpool_limits

from gossip.errors import KeyringError
from node import config as configuration
from node import logs, openfiles
from node.config import Config, ConfigError, loopback
from node.daemon import Daemon, SupersededError
from node.supervisor import ActorGaveUpError
from storage.errors import StorageError

EXIT_FAILED = 1
EXIT_CONFIG = 2
# Told apart, so that systemd does not start again what would take the name from the other process.
EXIT_SUPERSEDED = 3
# A few dozen requests in flight are more than the 700 objects after which Python looks for cycles among them, in vain: that
# took a tenth of a fan-out. Objects that are freed by their last reference do not count.
GC_THRESHOLD = (10_000, 20, 20)

log = structlog.get_logger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gmco-node", description="One GMC-O node: owns shards, answers queries."
    )
    parser.add_argument("--version", action="version", version=f"gmco-node {version('gmco')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (
        ("run", "run the node until SIGTERM"),
        ("check-config", "check the file and say what is wrong"),
    ):
        commands.add_parser(name, help=help_).add_argument("config", help="the node's TOML file")
    arguments = parser.parse_args()
    try:
        config = configuration.load(arguments.config)
    except ConfigError as error:
        return _fail("config", str(error), EXIT_CONFIG)
    if arguments.command == "check-config":
        print(f"{arguments.config}: good; {_summary(config)}")  # noqa: T201 - the command's answer
        for warning in config.warnings:
            print(f"warning: {warning}")  # noqa: T201 - the command's answer
        return 0
    logs.configure(config.log.level, config.log.format)
    return _run(_with_files(config))


def _with_files(config: Config) -> Config:
    files = openfiles.raise_limit()
    limits = openfiles.fit(config.limits, shards=config.cluster.shard_count, files=files)
    if limits != config.limits:
        log.warning(
            "few_files",
            warning=f"this process may open {files:,} files, so it takes {limits.connections} connections of apps, "
            f"{limits.http_connections} over HTTP and {limits.peer_connections} of nodes; raise the limit (ulimit -n, "
            "LimitNOFILE=) for more",
        )
    return dataclasses.replace(config, limits=limits)


def _summary(config: Config) -> str:
    cluster = config.cluster
    if cluster.alone:
        return f"node {config.node.name}, a cluster of its own"
    how = f"formed by {cluster.bootstrap} nodes" if cluster.bootstrap else "joined only"
    return f"node {config.node.name} of cluster {cluster.id}, {how}, {len(cluster.seeds)} seeds"


def _run(config: Config) -> int:
    for warning in config.warnings:
        log.warning("config", warning=warning)
    if not loopback(config.listen.host):
        log.warning(
            "insecure",
            warning=f"listening on {config.listen.host} without TLS and tokens: everyone who reaches these ports may "
            "read and write; keep them behind a firewall",
        )
    # What the imports made stays: no collection need look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    try:
        # Threads of a matrix product that wait spin: on a host that is busy with other nodes, more of them than
        # [storage] threads made a search of 17,000 rows four times slower (7 ms against 29).
        with threadpool_limits(config.storage.threads, user_api="blas"):
            trio.run(Daemon(config).run)
    except BaseException as group:
        error = _cause(group)
        if isinstance(error, SupersededError):
            return _fail(error.code, str(error), EXIT_SUPERSEDED)
        if isinstance(error, (StorageError, KeyringError, ActorGaveUpError)):
            return _fail(getattr(error, "code", "gave_up"), str(error))
        if isinstance(error, OSError):
            if error.errno == errno.EADDRINUSE:
                listen = config.listen
                ports = f"{listen.app_port}, {listen.http_port} or {listen.peer_port}"
                return _fail(
                    "port_in_use",
                    f"port {ports} on {config.listen.host} is in use; choose others in [listen]",
                )
            return _fail("os_error", f"{error.filename or ''} {error.strerror or error}".strip())
        raise
    return 0


def _cause(error: BaseException) -> BaseException:
    """The first error in nested groups: nurseries wrap what ended them, and cancellation follows it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _fail(code: str, message: str, exit_code: int = EXIT_FAILED) -> int:
    print(f"gmco-node: error[{code}]: {message}", file=sys.stderr)  # noqa: T201 - the process's last words
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
