"""Named places where a test may end the process, as a power cut would: SIGKILL, nothing flushed.

`SHOAL_FAULT=manifest.before_rename:3` kills this process the third time it passes that place. With
the variable unset a place costs one comparison.
"""

from __future__ import annotations

import os
import signal

from shoal.errors import SettingsError

__all__ = ["PLACES", "fault_point"]

PLACES = (
    "log.after_write",
    "log.after_fsync",
    "log.after_trim",
    "log.cut_after_remove",
    "log.cut_before_rename",
    "log.cut_after_rename",
    "seal.before_write",
    "seal.after_segment",
    "manifest.before_rename",
    "manifest.after_rename",
    "merge.after_segment",
    "merge.after_install",
    "index.after_publish",
    "drop.after_manifest",
    "outgoing.after_link",
    "transfer.after_chunk",
    "transfer.after_file",
    "transfer.after_complete",
    "install.after_begin",
    "install.after_log",
    "install.after_file",
    "install.after_manifest",
    "install.after_end",
)


def _armed() -> tuple[str, int]:
    name, _, count = os.environ.get("SHOAL_FAULT", "").partition(":")
    if not name:
        return "", 0
    if name not in PLACES or not count.isdigit() or int(count) < 1:
        raise SettingsError(
            f"SHOAL_FAULT={name}:{count} is not <place>:<n>; places are {', '.join(PLACES)}"
        )
    return name, int(count)


_place, _passes_left = _armed()


def fault_point(place: str) -> None:
    global _passes_left
    if place != _place:
        return
    _passes_left -= 1
    if _passes_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
