"""The monitor of a cluster: looks at records and nodes, decides in `failover`, changes records.

    every interval   leader? ─▶ ask all nodes ─▶ view ─▶ decide ─▶ one transaction per action

Several monitors may run; one leads (`leader`), the others follow the records, so that they know since
when a node is away should they take over. A transaction compares the shard's record as it was seen
and the leader's own record: whatever happened in between, a late change is no change.

All that it concludes is concluded in `monitor/failover.py`; this file has the clock and the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from monitor.failover import (
    Action,
    AddJoining,
    CancelJoining,
    FailoverRules,
    Finding,
    Leave,
    Promote,
    changed,
    decide,
)
from monitor.view import (
    ClusterView,
    Fact,
    NodeView,
    Setback,
    ShardView,
    lasting,
    remember,
    unregistered,
)
from shoal import limits, telemetry
from shoal.errors import InvariantError, ShoalError
from shoal.health import Health
from shoal.metadata.contract import Compare, Event, KeyValue, MetadataStore, Uncertain
from shoal.metadata.leadership import Leadership
from shoal.metadata.schema import (
    ACTIONS_KEY,
    COLLECTIONS_PREFIX,
    LEADER_KEY,
    NODES_PREFIX,
    SHARDS_PREFIX,
    ActionsRecord,
    CollectionRecord,
    CollectionState,
    NodeRecord,
    NodeRole,
    ShardRecord,
    TakenAction,
    shard_key,
)
from shoal.metadata.watched import Watched
from shoal.storage_api import ReplicaStatus, ShardKey

__all__ = ["SWITCH_KEY", "ClusterMonitor", "Deed", "MonitorStatus", "NodeDirectory"]

SWITCH_KEY = "settings/monitor"  # {"paused": true}: look, and change nothing
_CHANGES_AT_ONCE = 16  # transactions in flight: a dead node may mean hundreds
_PAUSE_S_MIN = 0.1  # between two looks, however much happens
_FACTS_OF_FOLLOWERS = ("unregistered", "short")  # what the records alone tell

_log = telemetry.logger("monitor")
_R = TypeVar("_R", CollectionRecord, ShardRecord, NodeRecord)


class AsksStatus(Protocol):
    async def status(self) -> list[ReplicaStatus]: ...


class NodeDirectory(Protocol):
    def get(self, node_id: str) -> AsksStatus:
        """Raises Unavailable when nobody knows where it is."""
        ...


@dataclass(frozen=True, slots=True)
class Deed:
    """One action that was tried. at: wall clock, for people. outcome: "done", "outrun" (the record or
    the leader was another one by then), "uncertain" (it may have happened) or "failed: why"."""

    at: datetime
    action: Action
    outcome: str


@dataclass(frozen=True, slots=True)
class MonitorStatus:
    """What this monitor knows. Of a follower: who leads. age_s: since the last look; None: never.
    story: the last STORY_ACTIONS_MAX deeds, oldest first."""

    leading: bool
    leader: str | None
    paused: bool
    age_s: float | None
    findings: tuple[Finding, ...]
    story: tuple[Deed, ...]

    @property
    def state(self) -> Health:
        states = [finding.state for finding in self.findings]
        return max(states, key=list(Health).index, default=Health.GREEN)


class _Switch(BaseModel):
    paused: bool = False


class ClusterMonitor:
    """nodes      how to reach a storage node, also one whose record has just vanished.
    lease      gives this process's lease, None while it has none; its record says who leads.
    clock      seconds that never go back.
    """

    def __init__(
        self,
        store: MetadataStore,
        nodes: NodeDirectory,
        *,
        node_id: str,
        settings: FailoverRules,
        lease: Callable[[], int | None],
        incarnation: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._nodes, self._rules, self._clock = store, nodes, settings, clock
        self._watched = Watched(
            store,
            [COLLECTIONS_PREFIX, SHARDS_PREFIX, NODES_PREFIX, SWITCH_KEY],
            on_change=self._on_change,
        )
        self._leadership = Leadership(
            store,
            LEADER_KEY,
            node_id=node_id,
            incarnation=incarnation or uuid.uuid4().hex,
            lease=lease,
        )
        self._records = _Records(self._watched.entries)
        self._since: dict[Fact, float] = {}
        self._setbacks: dict[tuple[ShardKey, str], Setback] = {}
        self._written: dict[str, int] = {}  # key -> revision of our own change, until we see it
        self._findings: tuple[Finding, ...] = ()
        self._story: deque[Deed] = deque(maxlen=limits.STORY_ACTIONS_MAX)
        self._untold: deque[Deed] = deque(maxlen=limits.ACTIONS_SHOWN_MAX)  # not in the store yet
        self._counts: Counter[tuple[str, str]] = Counter()
        self._red: set[ShardKey | None] = set()  # what the log had last
        self._looked_at: float | None = None
        self._paused = False
        self._wake = asyncio.Event()  # a node came or went: look soon
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the records, then look at intervals until `close`. Raises Unavailable."""
        await self._watched.start()
        self._task = asyncio.create_task(self._run(), name="cluster-monitor")

    async def close(self) -> None:
        """Give the lead to another monitor. May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._leadership.resign()
        await self._watched.close()

    def status(self) -> MonitorStatus:
        looked_at = self._looked_at
        return MonitorStatus(
            leading=self._leadership.leading,
            leader=self._leadership.leader,
            paused=self._paused,
            age_s=None if looked_at is None else self._clock() - looked_at,
            findings=self._findings,
            story=tuple(self._story),
        )

    def metrics(self) -> bytes:
        """Prometheus text."""
        lines = [
            "# HELP shoal_monitor_leading 1 while this monitor acts.",
            "# TYPE shoal_monitor_leading gauge",
            f"shoal_monitor_leading {int(self._leadership.leading)}",
            "# HELP shoal_monitor_findings What is wrong in the cluster, by severity.",
            "# TYPE shoal_monitor_findings gauge",
        ]
        for state in (Health.YELLOW, Health.RED):
            count = sum(finding.state is state for finding in self._findings)
            lines.append(f'shoal_monitor_findings{{state="{state}"}} {count}')
        lines += [
            "# HELP shoal_monitor_actions_total Changes of shard records, by kind and outcome.",
            "# TYPE shoal_monitor_actions_total counter",
        ]
        for (kind, outcome), count in sorted(self._counts.items()):
            labels = f'kind="{kind}",outcome="{outcome}"'
            lines.append(f"shoal_monitor_actions_total{{{labels}}} {count}")
        return ("\n".join(lines) + "\n").encode()

    # -- one round --------------------------------------------------------------------------------
    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as error:  # a bug must not end the watch; it must be seen
                _log.error("look_failed", error=error)
            pause_s = min(_PAUSE_S_MIN, self._rules.interval_s)
            await asyncio.sleep(pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rules.interval_s - pause_s):
                    await self._wake.wait()
            self._wake.clear()

    def _on_change(self, events: Sequence[Event]) -> None:
        """A lost lease counts from when it was heard of, not from the next look."""
        for event in events:
            if event.key.startswith(NODES_PREFIX):
                gone = unregistered(event.key.removeprefix(NODES_PREFIX))
                if event.value is None:
                    self._since.setdefault(gone, self._clock())
                else:
                    self._since.pop(gone, None)
                self._wake.set()

    async def look(self) -> MonitorStatus:
        """Look at everything now, and act if this monitor leads and is not paused.

        Cost  one question to every node at once, `ask_timeout_s` if one is silent; then a
              transaction per action.
        """
        try:
            leading = await self._leadership.campaign()
        except ShoalError as error:
            self._tell((Finding(Health.YELLOW, None, f"Metadata: {error.message}"),))
            return self.status()
        self._switch()
        answers = await self._ask_all() if leading else {}
        if self._watched.failing is not None:
            # Old records make wrong views: harmless, since every change compares, but pointless.
            why = f"The records cannot be followed: {self._watched.failing.message}"
            self._tell((Finding(Health.YELLOW, None, why),))
            return self.status()
        view = self._view(answers)
        facts = remember(view)
        if leading:
            self._since = facts
            self._setbacks = lasting(view, self._rules.setback_forgotten_s)
            await self._heal(view)
        else:
            self._since = {f: at for f, at in facts.items() if f[0] in _FACTS_OF_FOLLOWERS}
            self._tell(())
        self._looked_at = self._clock()
        return self.status()

    async def _heal(self, view: ClusterView) -> None:
        plan = decide(view, self._rules)
        findings = (*self._records.findings, *plan.findings)
        if self._paused:
            reason = f"The monitor is paused by {SWITCH_KEY}: nothing is healed."
            findings = (Finding(Health.YELLOW, None, reason), *findings)
        self._tell(findings)
        if not self._paused:
            records = {shard.key: shard.record for shard in view.shards}
            fence, slots = self._leadership.fence(), asyncio.Semaphore(_CHANGES_AT_ONCE)
            async with asyncio.TaskGroup() as group:
                for action in plan.actions:
                    record = records[action.key]
                    group.create_task(self._carry_out(action, record, fence, slots))
            if self._untold:
                await self._leave_word(fence)

    async def _leave_word(self, fence: Compare) -> None:
        """Put what was done where coordinators show it (`GET /shoal/v1/cluster`). What fails now is
        told with the next action: nothing depends on it."""
        told = list(self._untold)
        try:
            found = await self._store.get(ACTIONS_KEY)
            before = (
                [] if found is None else ActionsRecord.from_bytes(found.key, found.value).actions
            )
            actions = [*before, *map(_taken, told)][-limits.ACTIONS_SHOWN_MAX :]
            value = ActionsRecord(actions=actions).to_bytes()
            if (await self._store.txn([fence], {ACTIONS_KEY: value})).ok:
                self._untold.clear()
        except (ShoalError, InvariantError) as error:
            _log.info("actions_not_told", why=str(error))

    async def _carry_out(
        self, action: Action, record: ShardRecord, fence: Compare, slots: asyncio.Semaphore
    ) -> None:
        key = record.key
        async with slots:
            compares = [Compare(key, action.revision), fence]
            try:
                value = changed(record, action).to_bytes()
                result = await self._store.txn(compares, {key: value})
            except Uncertain:
                outcome = "uncertain"
            except ShoalError as error:
                outcome = f"failed: {error.message}"
            except InvariantError as error:  # a bug about one shard must not stop the others
                _log.error("action_refused", shard=key, error=error)
                outcome = f"failed: {error}"
            else:
                outcome = "done" if result.ok else "outrun"
                if result.ok:
                    self._written[key] = result.revision
                    self._note_setback(action)
        deed = Deed(datetime.now(UTC), action, outcome)
        self._story.append(deed)
        self._untold.append(deed)
        self._counts[_kind(action), outcome.partition(":")[0]] += 1
        _log.warning(
            _kind(action),
            shard=f"{record.collection_id}/{record.shard}",
            node=_whom(action),
            term=action.term if isinstance(action, Promote) else None,
            why=action.reason,
            outcome=outcome,
        )

    def _note_setback(self, action: Action) -> None:
        if isinstance(action, CancelJoining) and action.failed:
            place = (action.key, action.node)
            before = self._setbacks.get(place)
            count = 1 if before is None else before.count + 1
            self._setbacks[place] = Setback(count, self._clock())

    def _tell(self, findings: tuple[Finding, ...]) -> None:
        """Keep them for people; the log gets what has become red, once."""
        self._findings = findings
        red = {finding.key: finding.reason for finding in findings if finding.state is Health.RED}
        for key, reason in red.items():
            if key not in self._red:
                _log.error("needs_help", why=reason)
        self._red = set(red)

    def _switch(self) -> None:
        entry = self._watched.entries.get(SWITCH_KEY)
        try:
            paused = entry is not None and _Switch.model_validate_json(entry.value).paused
        except ValidationError:
            paused = True  # somebody wanted something; {"paused": false} is easily written
        if paused != self._paused:
            _log.warning("paused" if paused else "resumed", by=SWITCH_KEY)
        self._paused = paused

    # -- what there is ----------------------------------------------------------------------------
    async def _ask_all(self) -> dict[str, NodeView]:
        """Every storage node that is registered or holds something, all at once."""
        named = {name for _, record in self._records.shards() for name in record.members()}
        named |= {record.id for record in self._records.storage_nodes()}
        slots = asyncio.Semaphore(limits.ASKED_AT_ONCE_MAX)
        names = sorted(named)
        views = await asyncio.gather(*(self._ask(name, slots) for name in names))
        return dict(zip(names, views, strict=True))

    async def _ask(self, name: str, slots: asyncio.Semaphore) -> NodeView:
        """The view without the record."""
        async with slots:
            try:
                node = self._nodes.get(name)
            except ShoalError:
                return NodeView(name, asked=False)
            try:
                async with asyncio.timeout(self._rules.ask_timeout_s):
                    replicas = await node.status()
            except (ShoalError, TimeoutError):
                return NodeView(name)
            except Exception as error:  # a bug of ours must not look like a dead node in silence
                _log.error("ask_failed", node=name, error=error)
                return NodeView(name)
        if any(replica.node != name for replica in replicas):
            _log.error("wrong_node_answers", asked=name, answered=replicas[0].node)
            return NodeView(name)
        return NodeView(name, replicas={replica.key: replica for replica in replicas})

    def _view(self, answers: Mapping[str, NodeView]) -> ClusterView:
        """Answers and the records as they are now: newer than the answers, never older."""
        nodes = dict(answers)
        for record in self._records.storage_nodes():
            seen = nodes.get(record.id, NodeView(record.id))
            nodes[record.id] = NodeView(record.id, record, seen.replicas, seen.asked)
        return ClusterView(self._clock(), list(self._shards()), nodes, self._since, self._setbacks)

    def _shards(self) -> Iterator[ShardView]:
        """Of active collections; not those whose record we changed and have not seen yet."""
        active = {
            record.id: (record.name, _replication_factor(record))
            for record in self._records.collections()
            if record.state is CollectionState.ACTIVE
        }
        for revision, record in self._records.shards():
            if self._written.get(record.key, 0) > revision:
                continue
            self._written.pop(record.key, None)
            if record.collection_id in active:
                name, wanted = active[record.collection_id]
                key = ShardKey(record.collection_id, record.shard)
                yield ShardView(key, name, wanted, record, revision)


class _Records:
    """The entries as records, each read once per revision. findings: those that cannot be read."""

    def __init__(self, entries: Mapping[str, KeyValue]) -> None:
        self._entries = entries
        self._read: dict[str, tuple[int, object]] = {}

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(Health.RED, None, f"Metadata record {key}: {found}")
            for key, (_, found) in sorted(self._read.items())
            if isinstance(found, Exception)
        )

    def collections(self) -> Iterator[CollectionRecord]:
        for _, record in self._all(COLLECTIONS_PREFIX, CollectionRecord):
            yield record

    def shards(self) -> Iterator[tuple[int, ShardRecord]]:
        """With the revision. A record under another shard's key is damage, and left out."""
        for entry, record in self._all(SHARDS_PREFIX, ShardRecord):
            if entry.key == shard_key(record.collection_id, record.shard):
                yield entry.revision, record

    def storage_nodes(self) -> Iterator[NodeRecord]:
        for _, record in self._all(NODES_PREFIX, NodeRecord):
            if record.role is NodeRole.STORAGE:
                yield record

    def _all(self, prefix: str, form: type[_R]) -> Iterator[tuple[KeyValue, _R]]:
        for key in [key for key in self._read if key not in self._entries]:
            del self._read[key]
        for key in sorted(key for key in self._entries if key.startswith(prefix)):
            entry = self._entries[key]
            known = self._read.get(key)
            if known is None or known[0] != entry.revision:
                known = self._read[key] = (entry.revision, _parsed(form, entry))
            if isinstance(known[1], form):
                yield entry, known[1]


def _parsed(form: type[_R], entry: KeyValue) -> _R | Exception:
    """One record that cannot be read must not keep the others from being looked after."""
    try:
        return form.from_bytes(entry.key, entry.value)
    except (ShoalError, InvariantError, ValidationError) as error:
        _log.error("record_unreadable", key=entry.key, error=error)
        return error


def _replication_factor(record: CollectionRecord) -> int:
    """Straight from the request, which was checked when it came: this is asked every second."""
    wanted = record.config.get("replication_factor")
    return wanted if isinstance(wanted, int) else 1


def _whom(action: Action) -> str:
    return action.primary if isinstance(action, Promote) else action.node


def _taken(deed: Deed) -> TakenAction:
    action = deed.action
    return TakenAction(
        at=deed.at,
        action=_kind(action),
        collection_id=action.key.collection_id,
        shard=action.key.shard,
        node=_whom(action),
        outcome=deed.outcome,
        reason=action.reason,
    )


def _kind(action: Action) -> str:
    match action:
        case Promote():
            return "promote"
        case AddJoining():
            return "add_joining"
        case CancelJoining():
            return "cancel_joining"
        case Leave():
            return "leave"
