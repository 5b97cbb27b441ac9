"""Files of a replica on their way: whole sets, resumed transfers, damage, crashes at every place."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shoal import limits
from shoal.errors import BadRequest, Busy, NotFound, StorageFull, Unavailable
from shoal.files_api import FileChunk, FileSnapshot
from shoal.storage_api import ShardKey
from storage_node import faults, transfer
from storage_node.files import write_file
from storage_node.log import Log
from storage_node.manifest import Manifest, SegmentRecord, read_manifest, write_manifest
from storage_node.outgoing import Outgoing, TokenBucket, clear_outgoing
from storage_node.transfer import Progress, discard, download, finish_install, install

KEY = ShardKey(7, 0)
MIB = limits.MIB


async def inline(work: Callable[..., object], *arguments: object) -> object:
    return work(*arguments)


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


class Sender:
    """A replica on disk, and the node that serves it. Counts and can spoil what it sends."""

    def __init__(self, folder: Path, seed: int = 1, **options: object) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.clock = Clock()
        self.manifest = Manifest(collection_id=7, shard=0, term=3, checkpoint=50)
        self.sent_bytes = 0
        self.snapshots = self.released = 0
        self.spoil: Callable[[FileChunk], FileChunk | None] = lambda chunk: chunk
        self.before_chunk: Callable[[], None] = lambda: None
        (folder / "segments").mkdir(parents=True, exist_ok=True)
        self.outgoing = Outgoing(
            in_thread=inline,
            clock=self.clock,
            sleep=self.clock.sleep,
            **options,  # type: ignore[arg-type]
        )

    def add_segment(self, number: int, *sizes: int, text: str = "") -> None:
        here = self.folder / "segments" / str(number)
        here.mkdir()
        dice = random.Random(f"{number}{text}")
        files = {}
        for position, size in enumerate(sizes):
            name = f"vectors.{position}"
            files[name] = write_file(here / name, [dice.randbytes(size)])
        record = SegmentRecord(segment_id=number, rows=1, files=files)
        self._set(*self.manifest.segments, record)

    def drop_segment(self, number: int) -> None:
        self._set(*(each for each in self.manifest.segments if each.segment_id != number))
        here = self.folder / "segments" / str(number)
        for path in here.iterdir():
            path.unlink()
        here.rmdir()

    def _set(self, *segments: SegmentRecord) -> None:
        self.manifest = self.manifest.model_copy(
            update={"segments": segments, "checkpoint": self.manifest.checkpoint + 1}
        )
        write_manifest(self.folder, self.manifest)

    async def snapshot(self, shard: ShardKey) -> FileSnapshot:
        assert shard == KEY
        self.snapshots += 1
        return await self.outgoing.snapshot(self.folder, lambda: self.manifest)

    async def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        async for chunk in self.outgoing.fetch(snapshot_id, path, offset):
            self.before_chunk()
            self.sent_bytes += len(chunk.data)
            sent = self.spoil(chunk)
            if sent is None:
                return
            yield sent

    async def release(self, snapshot_id: str) -> None:
        self.released += 1
        await self.outgoing.release(snapshot_id)


@pytest.fixture
def sender(tmp_path: Path) -> Sender:
    sender = Sender(tmp_path / "there")
    sender.add_segment(1, 3 * MIB + 17, 5, 0)
    sender.add_segment(4, 2 * MIB)
    return sender


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


async def get(sender: Sender, here: Path, **options: object) -> Manifest:
    """As the code does it, without a reserve on this machine's disk."""
    given = {"in_thread": inline, "sleep": sender.clock.sleep, "disk_free_bytes_min": 0}
    return await download(sender, KEY, here, **(given | options))  # type: ignore[arg-type]


def fetch_all(sender: Sender, here: Path, **options: object) -> Manifest:
    return asyncio.run(get(sender, here, **options))


def assert_same(sender: Sender, here: Path) -> None:
    """The replica here is what the sender's manifest says, and can be opened at its checkpoint."""
    manifest = read_manifest(here)
    assert manifest is not None
    assert manifest.segments == sender.manifest.segments
    for record in manifest.segments:
        for name in record.files:
            path = Path("segments") / str(record.segment_id) / name
            assert (here / path).read_bytes() == (sender.folder / path).read_bytes(), path
    assert not (here / "incoming").exists()
    assert not (here / "installing").exists()
    log = Log(here / "log")
    assert list(log.open(manifest.checkpoint, new=False)) == []
    assert log.next_sequence == manifest.checkpoint + 1
    log.close()


# -- the whole way --------------------------------------------------------------------------------
def test_a_replica_is_copied_and_installed(sender: Sender, here: Path):
    progress = Progress()
    fetch_all(sender, here, progress=progress)
    assert not (here / "segments").exists(), "a download changes nothing of the replica"
    install(here)
    assert_same(sender, here)
    assert progress.bytes_received == progress.bytes_total == 5 * MIB + 22
    assert sender.released == 1
    assert list((sender.folder / "outgoing").iterdir()) == []


def test_in_threads_too(tmp_path: Path, here: Path):
    sender = Sender(tmp_path / "there")
    sender.outgoing = Outgoing()
    sender.add_segment(1, MIB + 1)
    fetch_all(sender, here, in_thread=asyncio.to_thread)
    install(here)
    assert_same(sender, here)


def test_an_empty_replica_is_copied(tmp_path: Path, here: Path):
    sender = Sender(tmp_path / "there")
    write_manifest(sender.folder, sender.manifest)
    fetch_all(sender, here)
    install(here)
    assert_same(sender, here)


def test_what_is_there_already_is_not_sent(sender: Sender, here: Path):
    fetch_all(sender, here)
    install(here)
    sender.drop_segment(4)
    sender.add_segment(5, MIB)
    sender.sent_bytes = 0
    fetch_all(sender, here)
    assert sender.sent_bytes == MIB
    install(here)
    assert_same(sender, here)


def test_a_segment_that_differs_is_replaced(sender: Sender, here: Path, tmp_path: Path):
    fetch_all(sender, here)
    install(here)
    other = Sender(tmp_path / "other")
    other.add_segment(1, 3 * MIB + 17, 5, 0, text="another history")
    fetch_all(other, here)
    assert_same_files(sender, here)
    install(here)
    assert_same(other, here)


def test_damage_in_the_old_replica_is_not_taken_over(sender: Sender, here: Path):
    fetch_all(sender, here)
    install(here)
    path = here / "segments" / "1" / "vectors.0"
    data = bytearray(path.read_bytes())
    data[MIB] ^= 1
    path.write_bytes(data)
    fetch_all(sender, here)
    install(here)
    assert_same(sender, here)


def test_the_manifest_may_be_adjusted(sender: Sender, here: Path):
    fetch_all(sender, here)
    done = install(here, adjust=lambda manifest: manifest.model_copy(update={"term": 9}))
    assert done.term == 9
    assert read_manifest(here) == done


def test_a_log_of_another_history_goes(sender: Sender, here: Path):
    old = Log(here / "log")
    assert list(old.open(0, new=True)) == []
    old.append([b"never committed"] * 90, 2)
    old.close()
    fetch_all(sender, here)
    install(here)
    assert_same(sender, here)


def test_without_a_download_nothing_is_installed(sender: Sender, here: Path):
    with pytest.raises(Unavailable):
        install(here)
    assert finish_install(here) is None
    fetch_all(sender, here)
    assert finish_install(here) is None, "a download alone is never taken over at a start"
    discard(here)
    with pytest.raises(Unavailable):
        install(here)


# -- interrupted ----------------------------------------------------------------------------------
class Cut(Exception):
    """The connection, as the other side of a test sees it."""


def cut_after(chunks: int) -> Callable[[], None]:
    left = chunks

    def before_chunk() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Unavailable("connection lost")

    return before_chunk


def test_a_download_goes_on_where_it_was(sender: Sender, here: Path):
    sender.before_chunk = cut_after(2)
    with pytest.raises(Unavailable):
        fetch_all(sender, here)
    assert sender.sent_bytes == 2 * MIB
    sender.before_chunk = lambda: None
    fetch_all(sender, here)
    assert sender.sent_bytes == 5 * MIB + 22, "nothing was sent twice"
    install(here)
    assert_same(sender, here)


@pytest.mark.parametrize("where", ["data", "sums", "short", "long"])
def test_a_damaged_part_is_cut_where_it_is_wrong(sender: Sender, here: Path, where: str):
    sender.before_chunk = cut_after(3)
    with pytest.raises(Unavailable):
        fetch_all(sender, here)
    (part,) = here.glob("incoming/1/vectors.0.*.part")
    (sums,) = here.glob("incoming/1/vectors.0.*.sums")
    assert part.stat().st_size == 3 * MIB
    path = sums if where == "sums" else part
    data = bytearray(path.read_bytes())
    if where == "short":
        del data[2 * MIB + 5 :]
    elif where == "long":
        data += b"torn write"
    else:
        data[2 * 8 + 5 if where == "sums" else 2 * MIB + 5] ^= 255
    path.write_bytes(data)
    sender.sent_bytes, sender.before_chunk = 0, lambda: None
    fetch_all(sender, here)
    again = 0 if where == "long" else MIB
    assert sender.sent_bytes == 2 * MIB + 22 + again
    install(here)
    assert_same(sender, here)


def test_a_finished_file_that_was_damaged_is_fetched_again(sender: Sender, here: Path):
    fetch_all(sender, here)
    path = here / "incoming" / "4" / "vectors.0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    sender.sent_bytes = 0
    fetch_all(sender, here)
    assert sender.sent_bytes == 2 * MIB
    install(here)
    assert_same(sender, here)


@pytest.mark.parametrize("seed", range(5))
def test_cancelled_at_any_moment(sender: Sender, here: Path, seed: int):
    print(f"seed {seed}")
    dice = random.Random(seed)

    async def story() -> None:
        for _ in range(20):
            task = asyncio.create_task(get(sender, here, in_thread=asyncio.to_thread))
            for _ in range(dice.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if len(sender.outgoing._held) > limits.SNAPSHOTS_MAX // 2:
                sender.clock.now_s += limits.SNAPSHOT_IDLE_S
        await get(sender, here)

    asyncio.run(story())
    install(here)
    assert_same(sender, here)


def test_an_expired_snapshot_is_replaced_and_what_fits_is_kept(sender: Sender, here: Path):
    """Midway the sender forgets the snapshot; one segment was merged away meanwhile, one is new."""
    chunks = 0

    def lose() -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 3:
            for held in list(sender.outgoing._held):
                asyncio.get_running_loop().create_task(sender.outgoing.release(held))
            sender.drop_segment(4)
            sender.add_segment(6, MIB)

    sender.before_chunk = lose
    progress = Progress()
    fetch_all(sender, here, progress=progress)
    assert progress.snapshots == 2
    assert sender.sent_bytes <= 4 * MIB + 22 + MIB
    install(here)
    assert_same(sender, here)


def test_a_sender_that_forgets_every_snapshot_is_given_up(sender: Sender, here: Path):
    async def nothing(snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        raise NotFound("no such snapshot")
        yield

    sender.fetch = nothing  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="dropped 10 snapshots"):
        fetch_all(sender, here)


def test_a_busy_sender_is_waited_for(sender: Sender, here: Path):
    async def hold() -> None:
        held = [await sender.snapshot(KEY) for _ in range(limits.SNAPSHOTS_MAX)]
        with pytest.raises(Busy):
            await sender.snapshot(KEY)
        sender.clock.now_s += 1
        task = asyncio.create_task(get(sender, here))
        await asyncio.sleep(0)
        assert not task.done()
        await sender.release(held[0].id)
        await task

    asyncio.run(hold())


# -- damage and nonsense on the wire --------------------------------------------------------------
def once(change: Callable[[FileChunk], FileChunk | None]) -> Callable[..., FileChunk | None]:
    left = [1]

    def spoil(chunk: FileChunk) -> FileChunk | None:
        if chunk.offset < MIB or not left:
            return chunk
        left.pop()
        return change(chunk)

    return spoil


@pytest.mark.parametrize(
    "change",
    [
        lambda chunk: replace(chunk, data=bytes([chunk.data[0] ^ 1]) + chunk.data[1:]),
        lambda chunk: replace(chunk, crc32c=chunk.crc32c ^ 1),
        lambda chunk: replace(chunk, offset=chunk.offset + 1),
        lambda chunk: replace(chunk, data=b"", crc32c=0),
        lambda chunk: replace(chunk, data=chunk.data * 5),
        lambda chunk: None,  # the stream ends early
    ],
)
def test_a_wrong_chunk_is_fetched_again(sender: Sender, here: Path, change):
    sender.spoil = once(change)
    fetch_all(sender, here)
    assert sender.sent_bytes == 6 * MIB + 22, "only that chunk was sent twice"
    install(here)
    assert_same(sender, here)


def test_a_sender_that_always_spoils_is_given_up(sender: Sender, here: Path):
    sender.spoil = lambda chunk: replace(chunk, crc32c=chunk.crc32c ^ 1)
    progress = Progress()
    with pytest.raises(Unavailable, match="does not fit its checksum, 5 times"):
        fetch_all(sender, here, progress=progress)
    assert progress.chunks_damaged == 5
    assert sender.released == 1


def test_damage_on_the_sender_s_disk_is_noticed(sender: Sender, here: Path):
    """Its chunks fit their checksums; the file does not."""
    path = sender.folder / "segments" / "4" / "vectors.0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(Unavailable, match=r"4/vectors\.0 does not fit its checksum"):
        fetch_all(sender, here)
    with pytest.raises(Unavailable):
        install(here)


@pytest.mark.parametrize(
    "name",
    [
        *("../MANIFEST", "..", ".", "", "/etc/passwd", "a/b", "a\\b", ".hidden", "x" * 200),
        *("a\0", "é", "vectors.0.part", "x.sums", "line\nend"),
    ],
)
def test_names_from_the_wire_are_never_trusted(sender: Sender, here: Path, name: str):
    (record, *_) = sender.manifest.segments
    size = record.files["vectors.1"]
    evil = record.model_copy(update={"files": {name: size}})
    manifest = sender.manifest.model_copy(update={"segments": (evil,)})

    async def lie(shard: ShardKey) -> FileSnapshot:
        files = tuple(transfer.snapshot_files(manifest))
        return FileSnapshot("x", manifest.model_dump_json().encode(), files)

    sender.snapshot = lie  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="names the file"):
        fetch_all(sender, here)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"collection_id": 8}, "another shard"),
        ({"shard": 1}, "another shard"),
        ({"segments": "twice"}, "numbers its segments"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(sender: Sender, here: Path, change, why):
    if "segments" in change:
        change = {"segments": (*sender.manifest.segments, *sender.manifest.segments)}
    manifest = sender.manifest.model_copy(update=change)
    snapshot = FileSnapshot(
        "x", manifest.model_dump_json().encode(), tuple(transfer.snapshot_files(manifest))
    )
    with pytest.raises(Unavailable, match=why):
        transfer._checked_manifest(snapshot, KEY)
    with pytest.raises(Unavailable, match="cannot be read"):
        transfer._checked_manifest(FileSnapshot("x", b"{}", ()), KEY)
    whole = sender.manifest.model_dump_json().encode()
    with pytest.raises(Unavailable, match="list of files"):
        transfer._checked_manifest(FileSnapshot("x", whole, ()), KEY)


def test_no_room_is_said_before_a_byte_comes(sender: Sender, here: Path):
    with pytest.raises(StorageFull, match="a copy of"):
        fetch_all(sender, here, disk_free_bytes_min=2**62)
    assert sender.sent_bytes == 0
    fetch_all(sender, here)


# -- crashes --------------------------------------------------------------------------------------
PLACES = [place for place in faults.PLACES if place.startswith(("transfer.", "install."))]


def in_a_process_that_dies(place: str, count: int, work: Callable[[], object]) -> None:
    """Run it in a fork that kills itself there. Whatever it had not synced stays as it was."""
    child = os.fork()
    if child == 0:
        faults._place, faults._passes_left = place, count
        try:
            work()
        finally:
            os._exit(1)  # it should have died
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"{place}:{count} was not passed ({status})"
    assert os.WTERMSIG(status) == signal.SIGKILL


CRASHES = [(place, 1) for place in [*PLACES, "manifest.before_rename", "manifest.after_rename"]]
CRASHES += [("transfer.after_chunk", 4), ("transfer.after_file", 3), ("install.after_file", 2)]
CRASHES += [(f"manifest.{when}", n) for when in ("before_rename", "after_rename") for n in (2, 3)]


@pytest.mark.parametrize(("place", "count"), CRASHES)
@pytest.mark.parametrize("older", [False, True])
def test_killed_anywhere_it_ends_whole(
    sender: Sender, tmp_path: Path, here: Path, place: str, count: int, older: bool
):
    """Over nothing, and over an older replica of another history with a log of its own."""
    if older:
        other = Sender(tmp_path / "other")
        other.add_segment(1, 3 * MIB + 17, 5, text="another history")
        fetch_all(other, here)
        install(here)
    before = read_manifest(here)

    def work() -> None:
        fetch_all(sender, here)
        install(here)

    in_a_process_that_dies(place, count, work)
    clear_outgoing(sender.folder)
    sender.outgoing = Outgoing(in_thread=inline, clock=sender.clock, sleep=sender.clock.sleep)
    done = finish_install(here)
    if done is None:
        now = read_manifest(here)
        if now == before:  # not taken over yet: the old replica is as it was
            if older:
                assert_same_files(other, here)
            fetch_all(sender, here)
            install(here)
    assert_same(sender, here)
    assert finish_install(here) is None, "an install is never done twice"


def assert_same_files(sender: Sender, here: Path) -> None:
    for record in sender.manifest.segments:
        for name in record.files:
            path = Path("segments") / str(record.segment_id) / name
            assert (here / path).read_bytes() == (sender.folder / path).read_bytes()


def test_an_install_whose_rest_cannot_be_deleted_is_over_all_the_same(
    sender: Sender, here: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else the next start would do it again, over a log that has gone on meanwhile."""
    fetch_all(sender, here)
    remove = transfer.shutil.rmtree

    def fails(path: Path, **options: object) -> None:
        if path.name != "installing":
            remove(path, **options)

    monkeypatch.setattr(transfer.shutil, "rmtree", fails)
    checkpoint = install(here).checkpoint
    log = Log(here / "log")
    assert list(log.open(checkpoint, new=False)) == []
    log.append([b"acknowledged"], 3)
    log.close()
    assert finish_install(here) is None
    (group,) = Log(here / "log").open(checkpoint, new=False)
    assert group.entries == (b"acknowledged",)


def test_an_install_of_which_a_file_vanished_is_refused(sender: Sender, here: Path):
    fetch_all(sender, here)
    in_a_process_that_dies("install.after_log", 1, lambda: install(here))
    (here / "installing" / "1" / "vectors.0").unlink()
    with pytest.raises(Exception, match=r"vectors\.0 is missing"):
        finish_install(here)


# -- the sending side -----------------------------------------------------------------------------
def test_a_snapshot_outlives_a_merge(sender: Sender, here: Path):
    async def story() -> bytes:
        taken = await sender.snapshot(KEY)
        sender.drop_segment(4)
        parts = [chunk.data async for chunk in sender.fetch(taken.id, "4/vectors.0", 0)]
        await sender.release(taken.id)
        with pytest.raises(NotFound):
            await anext(sender.outgoing.fetch(taken.id, "4/vectors.0", 0))
        return b"".join(parts)

    expected = (sender.folder / "segments/4/vectors.0").read_bytes()
    assert asyncio.run(story()) == expected


def test_a_snapshot_taken_during_a_merge_is_of_one_manifest(sender: Sender):
    """The first manifest is out of date when its files are linked."""
    old = sender.manifest
    sender.drop_segment(4)
    answers = [old, sender.manifest]

    async def story() -> FileSnapshot:
        return await sender.outgoing.snapshot(sender.folder, lambda: answers.pop(0))

    taken = asyncio.run(story())
    assert {file.path for file in taken.files} == {"1/vectors.0", "1/vectors.1", "1/vectors.2"}
    assert len(list((sender.folder / "outgoing").iterdir())) == 1


def test_files_that_never_stand_still_are_given_up(sender: Sender):
    old = sender.manifest
    sender.drop_segment(4)
    with pytest.raises(Unavailable):
        asyncio.run(sender.outgoing.snapshot(sender.folder, lambda: old))
    assert list((sender.folder / "outgoing").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["../MANIFEST", "4/../1/vectors.0", "/etc/passwd", "1", "", "1/vectors.9", "4//vectors.0"],
)
def test_a_path_that_is_not_in_the_snapshot_is_not_found(sender: Sender, path: str):
    async def story() -> None:
        taken = await sender.snapshot(KEY)
        with pytest.raises(NotFound):
            await anext(sender.outgoing.fetch(taken.id, path, 0))

    asyncio.run(story())


@pytest.mark.parametrize("offset", [-1, 6])
def test_an_offset_outside_the_file_is_refused(sender: Sender, offset: int):
    async def story() -> None:
        taken = await sender.snapshot(KEY)
        with pytest.raises(BadRequest):
            await anext(sender.outgoing.fetch(taken.id, "1/vectors.1", offset))
        assert [chunk async for chunk in sender.outgoing.fetch(taken.id, "1/vectors.1", 5)] == []

    asyncio.run(story())


def test_an_idle_snapshot_expires_and_a_used_one_does_not(sender: Sender):
    async def story() -> None:
        idle, used = await sender.snapshot(KEY), await sender.snapshot(KEY)
        stream = sender.outgoing.fetch(used.id, "1/vectors.0", 0)
        await anext(stream)
        sender.clock.now_s += limits.SNAPSHOT_IDLE_S
        await sender.outgoing.expire()
        with pytest.raises(NotFound):
            await anext(sender.outgoing.fetch(idle.id, "1/vectors.1", 0))
        assert [chunk.offset async for chunk in stream] == [MIB, 2 * MIB, 3 * MIB]
        await sender.outgoing.close()
        assert list((sender.folder / "outgoing").iterdir()) == []

    asyncio.run(story())


def test_few_files_are_sent_at_once_and_too_many_are_refused(sender: Sender):
    async def story() -> None:
        taken = await sender.snapshot(KEY)
        most = limits.TRANSFERS_MAX + limits.TRANSFERS_WAITING_MAX
        streams = [sender.outgoing.fetch(taken.id, "1/vectors.0", 0) for _ in range(most)]
        first = [asyncio.create_task(anext(stream)) for stream in streams]  # type: ignore[arg-type]
        for _ in range(3):
            await asyncio.sleep(0)
        assert sum(task.done() for task in first) == limits.TRANSFERS_MAX
        with pytest.raises(Busy):
            await anext(sender.outgoing.fetch(taken.id, "1/vectors.0", 0))
        for stream in streams[: limits.TRANSFERS_MAX]:
            await stream.aclose()  # type: ignore[attr-defined]
        for _ in range(3):
            await asyncio.sleep(0)
        assert sum(task.done() for task in first) == 2 * limits.TRANSFERS_MAX
        for task in first:
            task.cancel()
        await asyncio.wait(first)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(story())


def test_bandwidth_is_shared_and_kept(tmp_path: Path, here: Path):
    sender = Sender(tmp_path / "there", bytes_per_s=MIB)
    sender.add_segment(1, 10 * MIB)
    began_s = sender.clock.now_s
    fetch_all(sender, here)
    assert sender.clock.now_s - began_s == pytest.approx(10 - 4)  # a burst of 4 MiB is free


def test_token_bucket():
    bucket = TokenBucket(10.0, burst_bytes=20)
    assert [bucket.take(10, 0.0) for _ in range(4)] == [0.0, 0.0, 1.0, 2.0]
    assert bucket.take(10, 100.0) == 0.0
    assert TokenBucket(None).take(2**40, 0.0) == 0.0
