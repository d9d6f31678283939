"""What can go wrong in a replica's storage. Every error carries a stable `code` and a sentence that says what to do."""

from __future__ import annotations

from pathlib import Path


class StorageError(Exception):
    """Root of this package's errors."""

    code = "storage_error"


class DamagedError(StorageError):
    """Bytes at rest are not what was written. The replica must not serve; it is rebuilt from a peer."""

    code = "damaged"

    def __init__(self, path: Path | str, offset: int | None, reason: str) -> None:
        self.path, self.offset, self.reason = Path(path), offset, reason
        where = f"{path}" if offset is None else f"{path} at byte {offset}"
        super().__init__(
            f"{where} is damaged: {reason}; move the shard's directory away and rebuild it from a peer"
        )


class DamagedFileError(StorageError):
    """A small file of the node itself is not what was written. advice: what an operator does about it."""

    code = "damaged"

    def __init__(self, path: Path, reason: object, advice: str) -> None:
        super().__init__(f"{path} is damaged: {reason}; {advice}")


class FormatError(StorageError):
    """A durable file has a format version that this build does not know."""

    code = "unsupported_format"


class ForeignDataError(StorageError):
    """A data directory belongs to another node, shard, dimension or metric."""

    code = "foreign_data"


class DiskFullError(StorageError):
    """No room for a write. Nothing was changed; reads go on, and writes work again when there is room."""

    code = "disk_full"


class ReplicaStoppedError(StorageError):
    """A write or fsync failed with an unknown outcome. The replica takes no more writes until it is reopened."""

    code = "replica_stopped"


class LogGoneError(StorageError):
    """The log no longer reaches back to the asked sequence; the asker needs a snapshot."""

    code = "log_gone"


class QuarantineFullError(StorageError):
    """No more records can be put aside before somebody has looked at those that were."""

    code = "quarantine_full"


class IndexingError(StorageError):
    """The fresh part is full: writes wait until the graph has caught up."""

    code = "indexing"

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__(message)
