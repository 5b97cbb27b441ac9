"""Which changes of shard records would heal the cluster, given what was seen of it. Pure: no clock,
no network, no store.

    seen                                            decided
    records + answers + since when ──decide()──▶ Plan: actions in order, findings for people

What always holds, whatever was seen:
  - Only a node of the in-sync set is ever made primary, with the next term: such a node has every
    acknowledged write on its disk. When none of them is left nothing is done; a person must bring one
    back, and the finding says which.
  - A lost lease alone moves nothing (a store may lose one early): the node is asked directly first.
    A node that says that it is about to stop is believed at once.
  - One action per shard and round, each bound to the revision of the record that was seen. So two
    plans, or a plan and a primary's own change, never mix.
  - A copy is given up only while the in-sync set is complete and all of it answers.

What it leaves out: moving healthy replicas (emptying a node, balance), and creating or removing shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from monitor.view import (
    ClusterView,
    NodeView,
    ShardView,
    full,
    is_stopped,
    joining_at,
    outdated,
    short,
    silent,
    unregistered,
    unusable,
)
from shoal import limits
from shoal.errors import must
from shoal.health import Health
from shoal.metadata.schema import ShardRecord
from shoal.storage_api import ShardKey

__all__ = [
    "Action",
    "AddJoining",
    "CancelJoining",
    "FailoverRules",
    "Finding",
    "Leave",
    "Plan",
    "Promote",
    "changed",
    "decide",
]


@dataclass(frozen=True, slots=True)
class FailoverRules:
    """lease_ttl_s            of the nodes' leases.
    grace_s                a state must have lasted this long before it moves anything.
    metadata_lost_leases   a primary that answers is replaced when it has been without the metadata
                           store for more than this many leases: its clients see old records.
    missing_s              how long a primary may answer without having the replica: it may be
                           opening its shards.
    rereplicate_after_s    how long a shard may lack a copy before another node gets one: most
                           nodes come back, and then the tail of a log is enough.
    joining_stuck_s        how long a joining replica may stand still before it makes room. Files
                           show no progress here, so this must cover the copying of one shard.
    unread_stuck_s         the same for one whose primary does not understand it, or it the primary.
    rejoin_s               after a node had to give up a copy, it is not given it again for so long,
                           twice as long after each further time, up to rejoin_s_max.
    interval_s             between two looks. ask_timeout_s: for one node's answer.
    """

    lease_ttl_s: float = 10.0
    grace_s: float = 3.0
    metadata_lost_leases: float = 2.0
    missing_s: float = 30.0
    rereplicate_after_s: float = 60.0
    joining_stuck_s: float = 3_600.0
    unread_stuck_s: float = 60.0
    rejoin_s: float = 30.0
    rejoin_s_max: float = 3_600.0
    interval_s: float = 1.0
    ask_timeout_s: float = 2.0

    @property
    def setback_forgotten_s(self) -> float:
        """A setback of so long ago says nothing any more."""
        return 2 * self.rejoin_s_max

    @property
    def metadata_lost_s(self) -> float:
        return self.metadata_lost_leases * self.lease_ttl_s


# -- what is decided ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Promote:
    """Make `primary` the primary in `term`, with this in-sync set. revision: of the record that must
    still stand; reason: a sentence for people. The same in all actions."""

    key: ShardKey
    revision: int
    primary: str
    in_sync: tuple[str, ...]
    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class AddJoining:
    """`node` shall get a copy, or bring the one that it has up to date."""

    key: ShardKey
    revision: int
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class CancelJoining:
    """failed: the node could not take the copy, which is a `Setback`."""

    key: ShardKey
    revision: int
    node: str
    reason: str
    failed: bool = True


@dataclass(frozen=True, slots=True)
class Leave:
    """`node` shall delete its copy, which is not in sync and not needed."""

    key: ShardKey
    revision: int
    node: str
    reason: str


Action = Promote | AddJoining | CancelJoining | Leave


@dataclass(frozen=True, slots=True)
class Finding:
    """state red: somebody cannot write or read, and no action will change that by itself."""

    state: Health
    key: ShardKey | None
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """actions: in the order to do them, at most one per shard. findings: worst first."""

    actions: tuple[Action, ...]
    findings: tuple[Finding, ...]


def changed(record: ShardRecord, action: Action) -> ShardRecord:
    """The record after the action. Raises InvariantError for an action that was not made from it."""
    match action:
        case Promote():
            must(action.primary in record.in_sync, "promotes a replica that is not in sync")
            must(set(action.in_sync) <= set(record.in_sync), "a promotion enlarges the in-sync set")
            must(action.primary in action.in_sync, "a primary outside its in-sync set")
            must(action.term == record.term + 1, "a promotion takes the next term")
            return record.model_copy(
                update={
                    "term": action.term,
                    "primary": action.primary,
                    "in_sync": list(action.in_sync),
                }
            )
        case AddJoining():
            taken = {*record.in_sync, *record.joining, *record.leaving}
            must(action.node not in taken, "a node joins twice")
            return record.model_copy(update={"joining": [*record.joining, action.node]})
        case CancelJoining():
            must(action.node in record.joining, "cancels a node that does not join")
            left = [node for node in record.joining if node != action.node]
            return record.model_copy(update={"joining": left})
        case Leave():
            taken = {*record.in_sync, *record.joining, *record.leaving}
            must(action.node not in taken, "a member of the shard is told to leave")
            return record.model_copy(update={"leaving": [*record.leaving, action.node]})
        case _:
            assert_never(action)


def decide(view: ClusterView, rules: FailoverRules) -> Plan:
    """What to do now. Deterministic: the order of the view's mappings does not matter.

    Cost  O(replicas + joins * nodes).
    """
    planner = _Planner(view, rules)
    shards = sorted(view.shards, key=lambda shard: (shard.key.collection_id, shard.key.shard))
    left = [shard for shard in shards if not planner.promote(shard)]
    left = [shard for shard in left if not planner.cancel(shard)]
    # The fewer copies a shard has, the sooner it gets another.
    left.sort(key=lambda shard: len(shard.record.in_sync))
    left = [shard for shard in left if not planner.join(shard)]
    for shard in left:
        planner.leave(shard)
    for shard in shards:
        planner.look_at_messages(shard)
        planner.look_at_terms(shard)
    planner.look_at_nodes()
    findings = sorted(planner.findings, key=lambda found: -_SEVERITY[found.state])
    return Plan(tuple(planner.actions[: limits.ACTIONS_PER_ROUND_MAX]), tuple(findings))


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a primary does not do its work. ripe: act on it now, if there is somebody to take over.
    outage: nobody can write, and not only for a moment."""

    why: str
    ripe: bool
    outage: bool
    disk_full: bool = False  # and nothing else: it stays in the in-sync set, and serves reads


class _Planner:
    """One round. Keeps count of what the actions so far add to each node."""

    def __init__(self, view: ClusterView, rules: FailoverRules) -> None:
        self.view, self.rules = view, rules
        self.actions: list[Action] = []
        self.findings: list[Finding] = []
        self._troubled: set[ShardKey] = set()  # their primary cannot bring in anybody
        self._primaries: Counter[str] = Counter()
        self._copies: Counter[str] = Counter()
        self._receives: Counter[str] = Counter()
        self._sends: Counter[str] = Counter()
        for shard in view.shards:
            record = shard.record
            self._primaries[record.primary] += 1
            self._copies.update(record.members())
            self._receives.update(record.joining)
            self._sends[record.primary] += len(record.joining)

    # -- a new primary ----------------------------------------------------------------------------
    def promote(self, shard: ShardView) -> bool:
        trouble = self._trouble(shard)
        if trouble is None:
            return False
        self._troubled.add(shard.key)
        others = self._candidates(shard, writable_only=trouble.disk_full)
        if not others:
            self._no_candidate(shard, trouble)
            return False
        record = shard.record
        if not trouble.ripe:
            state = Health.RED if trouble.outage else Health.YELLOW
            self._find(state, shard, f"{trouble.why}; {others[0]} could take over.")
            return False
        chosen = others[0]
        stay = [n for n in record.in_sync if n != chosen and n != record.primary]
        if trouble.disk_full:
            stay.append(record.primary)
        self._primaries[chosen] += 1
        self._primaries[record.primary] -= 1
        self.actions.append(
            Promote(
                shard.key,
                shard.revision,
                chosen,
                (chosen, *stay),
                record.term + 1,
                f"{trouble.why}; {chosen} is in sync and takes over.",
            )
        )
        return True

    def _trouble(self, shard: ShardView) -> _Trouble | None:
        view, rules = self.view, self.rules
        node = view.node(shard.record.primary)
        primary = f"The primary {node.id}"
        if not node.answered:
            lasting = view.held_s(silent(node.id)) >= rules.grace_s
            if node.registered:
                why = f"{primary} holds its lease and does not answer"
                return _Trouble(why, ripe=False, outage=lasting)
            for_s = view.held_s(unregistered(node.id))
            if not node.asked:  # a monitor that began after it left: only time can tell
                why = (
                    f"{primary} has been without a lease for {for_s:.1f} s, its address is unknown"
                )
                return _Trouble(why, ripe=for_s > rules.metadata_lost_s, outage=lasting)
            why = f"{primary} lost its lease {for_s:.1f} s ago and does not answer"
            return _Trouble(why, ripe=for_s >= rules.grace_s, outage=lasting)
        replica = node.replica(shard.key)
        if replica is None or is_stopped(replica):
            for_s = view.held_s(unusable(shard, node))
            lasting = for_s >= rules.grace_s
            if replica is None:
                why = f"{primary} answers and does not have the replica for {for_s:.1f} s"
                return _Trouble(why, ripe=for_s >= rules.missing_s, outage=lasting)
            why = f"{primary} stopped its replica ({replica.info.stopped or 'no reason given'})"
            return _Trouble(why, ripe=lasting, outage=lasting)
        if not node.registered:
            lost_s = replica.metadata_lost_s
            why = f"{primary} answers and has had no metadata store for {lost_s:.1f} s"
            ripe = lost_s > rules.metadata_lost_s
            return _Trouble(why, ripe=ripe, outage=False)  # it serves whom it can
        if node.departing:  # it takes no more writes; no grace, since it said so itself
            return _Trouble(f"{primary} is being stopped", ripe=True, outage=False)
        if not replica.writable:
            for_s = view.held_s(full(node.id))
            why = f"The disk of the primary {node.id} has been full for {for_s:.1f} s"
            ripe = for_s >= rules.grace_s
            return _Trouble(why, ripe=ripe, outage=ripe, disk_full=True)
        return None

    def _candidates(self, shard: ShardView, *, writable_only: bool) -> list[str]:
        """In-sync nodes that are in touch and have the replica, best first: room on the disk, the
        longest log (nothing to fetch from others), the fewest shards to lead."""
        found: list[tuple[bool, int, int, str]] = []
        for name in shard.record.in_sync:
            node = self.view.node(name)
            replica = node.sound_replica(shard.key)
            if name == shard.record.primary or not node.in_touch or replica is None:
                continue
            if node.departing:
                continue
            if replica.writable or not writable_only:
                load = self._primaries[name]
                found.append((not replica.writable, -replica.durable, load, name))
        return [name for *_, name in sorted(found)]

    def _no_candidate(self, shard: ShardView, trouble: _Trouble) -> None:
        record = shard.record
        state = Health.RED if trouble.outage else Health.YELLOW
        node = self.view.node(record.primary)
        others = ", ".join(name for name in record.in_sync if name != record.primary)
        alone = f"and no other replica in sync can take over ({others or 'there is none'})"
        if trouble.disk_full:
            reason = f"{trouble.why} {alone}: writes are refused. Free disk space on {node.id}."
        elif node.departing:
            reason = f"{trouble.why} {alone}: there is no primary until it is started again."
        elif node.in_touch or node.answered:
            reason = f"{trouble.why} {alone}. See the log of {node.id}, or bring another one back."
        elif node.registered:
            reason = f"{trouble.why} {alone}. See the log of {node.id} and the network to it."
        else:
            names = ", ".join(record.in_sync)
            reason = (
                f"{trouble.why} {alone}: writes and fresh reads fail. Start one of these nodes again "
                f"with its data folder: {names}."
            )
            stale = ", ".join(each.id for each in self._stale(shard))
            if stale:
                reason += f" The copies on {stale} lack acknowledged writes and are not used."
        self._find(state, shard, reason)

    # -- copies that come -------------------------------------------------------------------------
    def cancel(self, shard: ShardView) -> bool:
        for name in shard.record.joining:
            node = self.view.node(name)
            reason = self._why_not_join(shard, node)
            failed = reason is not None
            reason = reason or self._who_came_back(shard, node)
            if reason is not None:
                self._receives[name] -= 1
                self._sends[shard.record.primary] -= 1
                self._copies[name] -= 1
                self.actions.append(CancelJoining(shard.key, shard.revision, name, reason, failed))
                return True
        return False

    def _why_not_join(self, shard: ShardView, node: NodeView) -> str | None:
        view, rules = self.view, self.rules
        replica = node.replica(shard.key)
        absent_s = view.held_s(unregistered(node.id))
        if not node.registered and not node.answered and absent_s >= rules.grace_s:
            return (
                f"The joining node {node.id} lost its lease {absent_s:.1f} s ago, does not answer."
            )
        if replica is not None and not node.registered:
            lost_s = replica.metadata_lost_s
            if lost_s > rules.metadata_lost_s:
                return f"The joining node {node.id} has had no metadata store for {lost_s:.1f} s."
        if replica is not None and is_stopped(replica):
            if view.held_s(unusable(shard, node)) >= rules.grace_s:
                why = replica.info.stopped or "no reason given"
                return f"The joining replica on {node.id} stopped ({why})."
            return None
        if not node.writable and view.held_s(full(node.id)) >= rules.grace_s:
            return f"The disk of the joining node {node.id} is full."
        still_s = view.held_s(joining_at(shard, node))
        if still_s >= rules.unread_stuck_s and self._misunderstood(shard, node):
            return (
                f"The joining replica on {node.id} has stood still for {still_s:.0f} s; it and the "
                f"primary {shard.record.primary} cannot read each other: {_VERSIONS}"
            )
        if still_s >= rules.joining_stuck_s:
            return (
                f"The joining replica on {node.id} has stood still for {rules.joining_stuck_s:g} s."
            )
        return None

    def _who_came_back(self, shard: ShardView, node: NodeView) -> str | None:
        replica = node.replica(shard.key)
        if replica is None or replica.durable == 0:
            for back in self._stale(shard):
                old = back.replica(shard.key)
                if old is not None and old.durable > 0 and self._has_room(back.id):
                    return f"{back.id} came back with a copy, and {node.id} has nothing yet."
        return None

    def _misunderstood(self, shard: ShardView, node: NodeView) -> bool:
        leader = self.view.node(shard.record.primary)
        here, there = node.replica(shard.key), leader.replica(shard.key)
        return (here is not None and here.unread == leader.id) or (
            there is not None and there.unread == node.id
        )

    def join(self, shard: ShardView) -> bool:
        record = shard.record
        missing = shard.wanted - len(record.in_sync)
        if missing <= 0:
            return False
        have = f"{len(record.in_sync)} of {shard.wanted} copies are in sync"
        if len(record.joining) >= missing:
            self._find(Health.YELLOW, shard, f"{have}; {', '.join(record.joining)} is joining.")
            return False
        if shard.key in self._troubled:
            return False  # said already; its primary could not bring in anybody
        chosen, why = self._returning(shard)
        if chosen is None:
            chosen, why = self._newcomer(shard)
        if chosen is None:
            self._find(Health.YELLOW, shard, f"{have}; {why}")
            return False
        self._receives[chosen] += 1
        self._sends[record.primary] += 1
        self._copies[chosen] += 1
        reason = f"{have}; {why}"
        self.actions.append(AddJoining(shard.key, shard.revision, chosen, reason))
        return True

    def _returning(self, shard: ShardView) -> tuple[str | None, str]:
        for node in self._stale(shard):
            if self._has_room(node.id):
                return node.id, f"{node.id} has an older copy and catches up."
        return None, ""

    def _stale(self, shard: ShardView) -> list[NodeView]:
        """Nodes in touch with a copy that is out of the set, the most complete first. A copy of a
        later term was in the set for longer; an empty one was never in it."""
        found: list[tuple[bool, int, int, str]] = []
        for node in self._outside(shard):
            replica = node.sound_replica(shard.key)
            if self._pause_s(shard, node) > 0:
                continue
            if replica is not None and replica.writable and not node.departing:
                found.append((replica.durable == 0, -replica.term, -replica.durable, node.id))
        return [self.view.nodes[name] for *_, name in sorted(found)]

    def _pause_s(self, shard: ShardView, node: NodeView) -> float:
        """How long it is not to be given this copy, because it could not take it before: whatever was
        in the way (a disk that is full while it copies) would be again."""
        setback = self.view.setbacks.get((shard.key, node.id))
        if setback is None:
            return 0.0
        doubled = min(setback.count - 1, _DOUBLED_MAX)
        pause_s = min(self.rules.rejoin_s * float(1 << doubled), self.rules.rejoin_s_max)
        return max(0.0, setback.at_s + pause_s - self.view.now_s)

    def _has_room(self, node: str) -> bool:
        return self._receives[node] < limits.RETURNS_PER_NODE_MAX

    def _newcomer(self, shard: ShardView) -> tuple[str | None, str]:
        record, rules = shard.record, self.rules
        for_s = self.view.held_s(short(shard))
        if for_s < rules.rereplicate_after_s:
            wait_s = rules.rereplicate_after_s - for_s
            return (
                None,
                f"another node gets a copy in {wait_s:.0f} s unless the old one comes back.",
            )
        zones = {
            node.record.zone for name in record.members() if (node := self.view.node(name)).record
        }
        found: list[tuple[bool, int, str]] = []
        paused: list[tuple[float, str]] = []
        for node in self._outside(shard):
            assert node.record is not None
            if (pause_s := self._pause_s(shard, node)) > 0:
                paused.append((pause_s, node.id))
            elif node.replica(shard.key) is None and not node.departing and node.writable:
                same_zone = bool(node.record.zone) and node.record.zone in zones
                found.append((same_zone, self._copies[node.id], node.id))
        if not found and paused:
            pause_s, name = min(paused)
            return None, f"{name} could not take one before; it is tried again in {pause_s:.0f} s."
        if not found:
            return None, "there is no other node that could hold one: start another storage node."
        if sum(self._receives.values()) >= limits.JOINS_MAX:
            return None, f"{limits.JOINS_MAX} other copies are under way; it waits for its turn."
        free = [each for each in found if self._receives[each[2]] < limits.JOINS_PER_NODE_MAX]
        if not free or self._sends[record.primary] >= limits.JOINS_PER_NODE_MAX:
            return None, "the nodes concerned are busy copying other shards; it waits for its turn."
        return min(free)[2], f"since {for_s:.0f} s, so {min(free)[2]} gets a new copy."

    # -- copies that go ---------------------------------------------------------------------------
    def leave(self, shard: ShardView) -> None:
        record = shard.record
        nodes = {name: self.view.node(name) for name in record.in_sync}
        sound = {n for n, node in nodes.items() if node.in_touch and node.sound_replica(shard.key)}
        if record.primary not in sound or shard.key in self._troubled:
            return
        # Otherwise the record may be about to change: then the old copy is worth having.
        enough = len(sound) == len(nodes) and len(nodes) >= shard.wanted
        for node in self._outside(shard):
            replica = node.replica(shard.key)
            if replica is None or not (enough or is_stopped(replica)):
                continue
            reason = (
                f"{len(nodes)} copies are in sync and {shard.wanted} are wanted; the one on {node.id} "
                + ("is damaged and in the way of a new one." if is_stopped(replica) else "is old.")
            )
            self.actions.append(Leave(shard.key, shard.revision, node.id, reason))
            return

    def look_at_terms(self, shard: ShardView) -> None:
        """Replicas take terms from records. A record may be on its way to us, but one that stays behind
        is of a metadata store that went back. Nobody listens to it, and who of its in-sync set has
        everything is not known, so no action is taken."""
        if self.view.held_s(outdated(shard)) < self.rules.grace_s:
            return
        for name in shard.record.members():
            replica = self.view.node(name).replica(shard.key)
            if replica is not None and replica.term > shard.record.term:
                why = (
                    f"its record is of term {shard.record.term}, and the replica on {name} of term "
                    f"{replica.term}: the metadata is older than the data. Nobody can write. See "
                    '"After etcd was restored" in docs/operating.md.'
                )
                self._find(Health.RED, shard, why)
                return

    def look_at_messages(self, shard: ShardView) -> None:
        """Whoever runs an older version may take no part in some things that its peers do."""
        for name in shard.record.members():
            replica = self.view.node(name).replica(shard.key)
            if replica is not None and replica.unread:
                why = f"{name} cannot read what {replica.unread} says: {_VERSIONS}"
                self._find(Health.YELLOW, shard, why)

    def look_at_nodes(self) -> None:
        """A sentence for every node that holds copies and is away."""
        for name in sorted(self.view.nodes):
            node = self.view.nodes[name]
            if self._copies[name] and not node.in_touch:
                lacks = "has lost its lease" if not node.registered else "does not answer"
                lacks += " and does not answer" if not node.registered and not node.answered else ""
                reason = f"Storage node {name} {lacks}; it holds {self._copies[name]} copies."
                self.findings.append(Finding(Health.YELLOW, None, reason))

    # -- helpers ----------------------------------------------------------------------------------
    def _outside(self, shard: ShardView) -> Iterator[NodeView]:
        """Nodes in touch that the record does not name, by id."""
        record = shard.record
        named = {*record.in_sync, *record.joining, *record.leaving}
        for name in sorted(self.view.nodes):
            node = self.view.nodes[name]
            if name not in named and node.in_touch:
                yield node

    def _find(self, state: Health, shard: ShardView, reason: str) -> None:
        name = shard.name[0].upper() + shard.name[1:]
        self.findings.append(Finding(state, shard.key, f"{name}: {reason}"))


_DOUBLED_MAX = 30  # more has no meaning and ends beyond what floats hold
_VERSIONS = "do they run versions of Shoal that do not know each other?"
_SEVERITY = {Health.GREEN: 0, Health.YELLOW: 1, Health.RED: 2}
