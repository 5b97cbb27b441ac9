"""How far an import came, kept beside nothing of the user's: in the cache folder.

One small file per (source, server, collection), with the source's fingerprint. It holds the number
of rows from the beginning that the server acknowledged without a gap; an import that was cut off
begins there. It goes away when the import is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

__all__ = ["Progress", "fingerprint"]

_EDGE_BYTES = 64 * 1024


def fingerprint(path: Path, options: str) -> str:
    """Size, time of change, both ends of the file, and how it was asked to be read: all equal means
    that row n is the same point as last time."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {options}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, stat.st_size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


class Progress:
    """The note on one import."""

    def __init__(self, source: Path, url: str, collection: str, mark: str) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(f"{source.resolve()}\n{url}\n{collection}".encode()).hexdigest()
        self.path = cache / "shoal" / "imports" / f"{name[:32]}.json"
        self._mark = mark

    def load(self) -> int:
        """Rows that need not be sent again; 0 when there is no note, or it is of another file."""
        try:
            noted = json.loads(self.path.read_bytes())
            return int(noted["rows"]) if noted["fingerprint"] == self._mark else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def save(self, rows: int) -> None:
        """Not fsynced: a note that is lost or old costs only time, as rows may be sent twice."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps({"fingerprint": self._mark, "rows": rows}))
        temporary.replace(self.path)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
