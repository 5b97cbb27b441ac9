"""The write-ahead log: what survives, what is cut, what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shoal.errors import ShardStopped, StorageFull
from storage_node.log import Log


def opened(folder: Path, after: int = 0) -> tuple[Log, list[tuple[int, bytes]]]:
    log = Log(folder)
    entries = [(g.first + i, e) for g in log.open(after, new=True) for i, e in enumerate(g.entries)]
    return log, entries


def filled(folder: Path, groups: list[list[bytes]]) -> None:
    log, _ = opened(folder)
    for group in groups:
        log.append(group, term=1)
    log.close()


def test_entries_come_back_in_order_with_their_numbers(tmp_path: Path) -> None:
    filled(tmp_path, [[b"a", b""], [b"c" * 1000]])
    log, entries = opened(tmp_path)
    assert entries == [(1, b"a"), (2, b""), (3, b"c" * 1000)]
    assert log.append([b"d"], term=1) == 4
    log.close()


def test_rotated_files_are_trimmed_only_when_all_their_entries_are_elsewhere(
    tmp_path: Path,
) -> None:
    log, _ = opened(tmp_path)
    log.append([b"1", b"2"], term=1)
    log.rotate()
    log.append([b"3"], term=1)
    log.rotate()
    log.append([b"4"], term=1)
    log.trim(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n:020d}.log" for n in (3, 4)]
    log.close()
    log, entries = opened(tmp_path, after=2)
    assert entries == [(3, b"3"), (4, b"4")]
    log.close()


def test_a_checkpoint_hides_the_groups_before_it(tmp_path: Path) -> None:
    filled(tmp_path, [[b"1", b"2"], [b"3", b"4"]])
    log, entries = opened(tmp_path, after=2)
    assert entries == [(3, b"3"), (4, b"4")]
    log.close()


@pytest.mark.parametrize("lost", [1, 7, 39, 40, 41, 60])
def test_a_torn_tail_is_cut_and_the_log_goes_on(tmp_path: Path, lost: int) -> None:
    filled(tmp_path, [[b"first"], [b"x" * 16]])
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - lost)
    log, entries = opened(tmp_path)
    assert entries == [(1, b"first")]
    assert log.append([b"second"], term=1) == 2
    log.close()
    log, entries = opened(tmp_path)
    assert entries == [(1, b"first"), (2, b"second")]
    log.close()


def test_damage_at_every_offset_is_detected(tmp_path: Path) -> None:
    """A flipped byte in the last group looks like a torn tail; anywhere before, it is refused."""
    filled(tmp_path, [[b"first", b"second"], [b"third"], [b"last"]])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    last_group = len(whole) - 40 - 8
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 0xFF
        path.write_bytes(damaged)
        if offset < last_group:
            with pytest.raises(ShardStopped, match=rf"{path.name}: the log is damaged at offset"):
                opened(tmp_path)
            assert path.read_bytes() == damaged, "evidence must stay as it is"
        else:
            log, entries = opened(tmp_path)
            log.close()
            assert [e for _, e in entries] == [b"first", b"second", b"third"]
            tmp_path.joinpath(path.name).write_bytes(whole)


def test_a_missing_file_in_the_middle_is_refused(tmp_path: Path) -> None:
    log, _ = opened(tmp_path)
    for entry in (b"1", b"2", b"3"):
        log.append([entry], term=1)
        log.rotate()
    log.close()
    (tmp_path / f"{2:020d}.log").unlink()
    with pytest.raises(ShardStopped, match="log entries 2 to 2 are missing"):
        opened(tmp_path)


def test_user_bytes_cannot_pass_for_a_group(tmp_path: Path) -> None:
    """A torn group whose payload is a copy of an older log file must still be a torn tail."""
    other = tmp_path / "other"
    filled(other, [[b"old"]])
    (old,) = other.iterdir()
    folder = tmp_path / "log"
    filled(folder, [[b"first"], [old.read_bytes() * 3]])
    (path,) = folder.iterdir()
    os.truncate(path, path.stat().st_size - 1)
    log, entries = opened(folder)
    assert entries == [(1, b"first")]
    log.close()


def test_a_full_disk_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = opened(tmp_path)
    log.append([b"first"], term=1)
    real = os.write
    left = [10]

    def full(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, bytes(data)[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageFull):
        log.append([b"second"], term=1)
    monkeypatch.undo()
    assert log.append([b"third"], term=1) == 2
    log.close()
    _, entries = opened(tmp_path)
    assert entries == [(1, b"first"), (2, b"third")]


def test_after_a_failed_fsync_nothing_more_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = opened(tmp_path)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        log.append([b"first"], term=1)
    monkeypatch.undo()
    with pytest.raises(ShardStopped):
        log.append([b"second"], term=1)
    log.close()
