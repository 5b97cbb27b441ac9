"""The data folder of a server: its layout, its format number, its lock.

    FORMAT            "shoal data, format 1"; a newer number is refused
    LOCK              held by flock while a server runs; the kernel frees it when the process ends
    server.json       {"pid", "http_host", "http_port", "grpc_port", ...} while requests are answered
    server.log        of a server that `shoal demo` started
    metadata.sqlite   the catalog
    shards/<collection id>/<shard>/
    NODE              of a storage node instead of the catalog: {"node_id", "cluster_id"}

A folder that has other things in it and no FORMAT is refused untouched: it is somebody's home. So
is one with shards and no catalog: shards that the catalog does not know are deleted at start. The
folder of a storage node belongs to that node and its cluster for good: another one would delete what
is in it, for the same reason.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.errors import DataDirectoryLocked, FormatTooNew, StartupError

__all__ = ["FORMAT", "DataDirectory", "Membership", "ServerInfo"]

FORMAT = 1
_FORMAT_TEXT = re.compile(r"shoal data, format (\d+)\s*")
_HARMLESS = frozenset({"LOCK", "server.json", "lost+found"})  # what an empty folder may hold


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Who answers for a data folder, and where."""

    pid: int
    http_host: str
    http_port: int
    version: str
    grpc_port: int = 0

    @property
    def url(self) -> str:
        host = f"[{self.http_host}]" if ":" in self.http_host else self.http_host
        return f"http://{host}:{self.http_port}"


@dataclass(frozen=True, slots=True)
class Membership:
    """Which storage node of which cluster a folder belongs to."""

    node_id: str
    cluster_id: str


class DataDirectory:
    """An open, locked data folder. A context manager; leaving it frees the lock.

    of_node          True: of a storage node of a cluster; else of a server of its own.
    Raises on entry  DataDirectoryLocked, FormatTooNew, StartupError; nothing was changed then.
    """

    def __init__(self, path: Path, *, of_node: bool = False) -> None:
        self.path = path.absolute()
        self._of_node = of_node
        self._lock: int | None = None

    @property
    def metadata(self) -> Path:
        return self.path / "metadata.sqlite"

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    def __enter__(self) -> DataDirectory:
        try:
            self._make()
            self._lock = self._take_lock()
            try:
                self._check_format()
                self._check_owner()
                self.withdraw()  # of a server that was killed: the lock shows that it is gone
            except BaseException:
                self._free_lock()
                raise
        except OSError as error:
            raise StartupError(
                f"The data folder {self.path} cannot be used: {error.strerror} "
                f"({error.filename}). Give another --data-dir, or the right to write to it."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._free_lock()

    def announce(self, info: ServerInfo) -> None:
        """Write server.json, whole or not at all: others wait for it to see that we are ready."""
        _write_whole(self.path / "server.json", json.dumps(asdict(info)) + "\n", durable=False)

    def withdraw(self) -> None:
        (self.path / "server.json").unlink(missing_ok=True)

    def membership(self) -> Membership | None:
        """None: the folder is new. Raises StartupError when the file is damaged."""
        path = self.path / "NODE"
        try:
            return Membership(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StartupError(
                f"The file {path} is damaged: it should say which node of which cluster this is."
            ) from error

    def remember(self, membership: Membership) -> None:
        """Durable when it returns."""
        _write_whole(self.path / "NODE", json.dumps(asdict(membership)) + "\n", durable=True)

    def holder(self) -> ServerInfo | int | None:
        """Who holds the lock, as far as it said: its address, else its pid, else nothing."""
        try:
            return ServerInfo(**json.loads((self.path / "server.json").read_text()))
        except (OSError, ValueError, TypeError):
            pass
        try:
            return int((self.path / "LOCK").read_text())
        except (OSError, ValueError):
            return None

    # -- inside ------------------------------------------------------------------------------------

    def _make(self) -> None:
        if self.path.is_dir():
            strangers = {entry.name for entry in self.path.iterdir()} - _HARMLESS
            if strangers and not (self.path / "FORMAT").exists():
                raise StartupError(
                    f"The folder {self.path} is not empty and is no data folder of Shoal "
                    f"(it has {min(strangers)}). Give an empty or a new --data-dir."
                )
            return
        missing = [self.path]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        self.path.mkdir(parents=True)
        for folder in missing:
            _sync_folder(folder.parent)

    def _take_lock(self) -> int:
        lock = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise DataDirectoryLocked(self._who_has_it()) from None
        except BaseException:
            os.close(lock)
            raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _free_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # the file stays: removing it would race with the next holder
            self._lock = None

    def _who_has_it(self) -> str:
        match self.holder():
            case ServerInfo() as info:
                who = f"process {info.pid} at {info.url}"
            case int() as pid:
                who = f"process {pid}, which is starting or stopping"
            case None:
                who = "another process"
        return (
            f"The data folder {self.path} is in use by {who}. "
            "Stop that server first, or give another --data-dir."
        )

    def _check_format(self) -> None:
        path = self.path / "FORMAT"
        if not path.exists():
            _write_whole(path, f"shoal data, format {FORMAT}\n", durable=True)
        match = _FORMAT_TEXT.fullmatch(path.read_text(errors="replace"))
        if match is None:
            raise StartupError(f"The file {path} is damaged: it should say which format this is.")
        if int(match[1]) > FORMAT:
            raise FormatTooNew(
                f"The data folder {self.path} has format {match[1]}; this Shoal knows up to "
                f"{FORMAT}. Use the newer version of Shoal that wrote it."
            )

    def _check_owner(self) -> None:
        member = (self.path / "NODE").exists()
        if member and not self._of_node:
            raise StartupError(
                f"The folder {self.path} is of a storage node of a cluster: start it with `shoal "
                "storage-node`, or give another --data-dir."
            )
        if self._of_node and self.metadata.exists():
            raise StartupError(
                f"The folder {self.path} is of a server of its own (`shoal serve`) and cannot "
                "become a storage node's: give another --data-dir, and copy the points over."
            )
        if member:
            return
        if not self.metadata.exists() and self.shards.is_dir() and any(self.shards.iterdir()):
            raise StartupError(
                f"The catalog {self.metadata} is missing and there are shards in {self.shards}. "
                "Starting would take them for left-overs and delete them. Restore the catalog "
                "from a backup, or move the shards away."
            )


def _write_whole(path: Path, text: str, *, durable: bool) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
