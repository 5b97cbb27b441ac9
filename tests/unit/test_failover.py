"""The monitor's decisions: a table of cases, rules that hold for any view, and whole stories."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.failover import (
    Action,
    AddJoining,
    CancelJoining,
    FailoverRules,
    Leave,
    Plan,
    Promote,
    changed,
    decide,
)
from monitor.view import ClusterView, Fact, NodeView, Setback, ShardView, lasting, remember
from shoal import limits
from shoal.errors import InvariantError
from shoal.health import Health
from shoal.metadata.schema import NodeRecord, NodeRole, ShardRecord
from shoal.storage_api import ReplicaStatus, ShardInfo, ShardKey

RULES = FailoverRules()
KEY = ShardKey(7, 0)
NOW = 1_000.0


def replica(
    key: ShardKey = KEY,
    node: str = "s1",
    *,
    role: str = "secondary",
    term: int = 1,
    durable: int = 10,
    writable: bool = True,
    lost_s: float = 0.0,
    stopped: str | None = None,
    unread: str = "",
) -> ReplicaStatus:
    info = ShardInfo(stopped=stopped)
    return ReplicaStatus(node, role, term, durable, durable, writable, key, info, lost_s, unread)


def node(
    name: str,
    *replicas: ReplicaStatus,
    lease: bool = True,
    answers: bool = True,
    zone: str = "",
    draining: bool = False,
) -> NodeView:
    record = NodeRecord(
        id=name, role=NodeRole.STORAGE, incarnation="i", zone=zone, draining=draining
    )
    found = {each.key: replace(each, node=name) for each in replicas}
    return NodeView(name, record if lease else None, found if answers else None)


def shard(
    in_sync: str,
    joining: str = "",
    leaving: str = "",
    *,
    wanted: int = 3,
    term: int = 4,
    key: ShardKey = KEY,
) -> ShardView:
    members = in_sync.split()
    record = ShardRecord(
        collection_id=key.collection_id,
        shard=key.shard,
        term=term,
        primary=members[0],
        in_sync=members,
        joining=joining.split(),
        leaving=leaving.split(),
    )
    return ShardView(key, "films", wanted, record, 40 + key.shard)


def plan(
    shards: ShardView | list[ShardView],
    *nodes: NodeView,
    held_s: float = 3_000.0,
    held: dict[Fact, float] | None = None,
    setbacks: dict[tuple[ShardKey, str], Setback] | None = None,
) -> Plan:
    """Decide with every fact of the view having held for `held_s`, those in `held` differently."""
    listed = shards if isinstance(shards, list) else [shards]
    view = ClusterView(NOW, listed, {each.id: each for each in nodes}, setbacks=setbacks or {})
    since = dict.fromkeys(remember(view), NOW - held_s)
    since |= {fact: NOW - seconds for fact, seconds in (held or {}).items()}
    return decide(replace(view, since=since), RULES)


def sound(*names: str, **options: object) -> list[NodeView]:
    return [node(name, replica(**options)) for name in names]  # type: ignore[arg-type]


GONE = {"lease": False, "answers": False}


# -- a new primary --------------------------------------------------------------------------------
def promotion(found: Plan) -> Promote:
    assert len(found.actions) == 1, found
    assert isinstance(found.actions[0], Promote), found
    return found.actions[0]


def test_a_dead_primary_is_replaced_and_leaves_the_set():
    found = promotion(plan(shard("s1 s2 s3"), node("s1", **GONE), *sound("s2", "s3")))
    assert (found.primary, found.in_sync, found.term) == ("s2", ("s2", "s3"), 5)
    assert found.revision == 40
    assert "s1 lost its lease" in found.reason
    record = changed(shard("s1 s2 s3").record, found)
    assert (record.primary, record.term, record.in_sync) == ("s2", 5, ["s2", "s3"])


def leaving(name: str, **options: object) -> NodeView:
    return node(name, replica(**options), draining=True)  # type: ignore[arg-type]


def test_a_primary_that_says_that_it_stops_is_replaced_at_once():
    found = promotion(plan(shard("s1 s2 s3"), leaving("s1"), *sound("s2", "s3"), held_s=0))
    assert (found.primary, found.in_sync) == ("s2", ("s2", "s3"))
    assert "being stopped" in found.reason
    found = promotion(plan(shard("s1 s2 s3"), leaving("s1"), leaving("s2"), *sound("s3"), held_s=0))
    assert found.primary == "s3"


def test_metadata_that_are_older_than_the_data_are_for_people():
    nodes = [*sound("s1"), node("s2", replica(term=5)), *sound("s3")]
    found = plan(shard("s1 s2 s3", term=4), *nodes)
    assert not found.actions
    assert found.findings[0].state is Health.RED
    assert "is of term 4, and the replica on s2 of term 5" in found.findings[0].reason
    assert not plan(shard("s1 s2 s3", term=5), *nodes).findings
    assert not plan(shard("s1 s2 s3", term=4), *nodes, held_s=2).findings


def test_nothing_moves_when_all_stop_or_none_can_take_over():
    assert not plan(shard("s1 s2"), leaving("s1"), leaving("s2"), held_s=0).actions
    assert not plan(shard("s1", wanted=1), leaving("s1"), held_s=0).actions
    assert not plan(shard("s1 s2"), *sound("s1"), leaving("s2"), held_s=0).actions


def test_a_copy_on_a_node_that_stops_does_not_return():
    assert not plan(shard("s1 s2"), *sound("s1", "s2"), leaving("s3"), held_s=5).actions


def test_nothing_happens_within_the_grace_period():
    found = plan(shard("s1 s2"), node("s1", **GONE), *sound("s2"), held_s=2.9)
    assert not found.actions
    assert found.findings[0].state is Health.YELLOW


def test_a_primary_without_lease_that_answers_is_left_alone():
    alive = node("s1", replica(lost_s=19.9), lease=False)
    found = plan(shard("s1 s2 s3"), alive, *sound("s2", "s3"))
    assert not found.actions
    assert found.findings[0].state is Health.YELLOW


def test_a_primary_that_has_had_no_metadata_for_two_leases_is_replaced():
    cut_off = node("s1", replica(lost_s=20.1), lease=False)
    found = promotion(plan(shard("s1 s2 s3"), cut_off, *sound("s2", "s3"), held_s=0.5))
    assert (found.primary, found.in_sync) == ("s2", ("s2", "s3"))


def test_a_primary_with_a_lease_that_does_not_answer_stays():
    """The way from the monitor to it may be broken, and only that one."""
    found = plan(shard("s1 s2"), node("s1", replica(), answers=False), *sound("s2"))
    assert not found.actions
    assert found.findings[0].state is Health.RED
    assert "does not answer" in found.findings[0].reason
    silent = {"s1": node("s1", replica(), answers=False), "s2": node("s2", replica())}
    view = ClusterView(NOW, [shard("s1 s2")], silent)
    assert not decide(view, replace(RULES, grace_s=0.0)).actions


@pytest.mark.parametrize(
    ("nodes", "primary"),
    [
        ([node("s2", replica(durable=9)), node("s3", replica(durable=10))], "s3"),
        ([node("s2", replica(writable=False)), node("s3", replica(durable=1))], "s3"),
        ([node("s2", replica(stopped="bad crc")), node("s3", replica(durable=1))], "s3"),
        ([node("s2", replica(role="stopped")), node("s3", replica(durable=1))], "s3"),
        ([node("s2"), node("s3", replica(durable=1))], "s3"),
        ([node("s2", replica(), answers=False), node("s3", replica(durable=1))], "s3"),
        ([node("s2", replica(), lease=False), node("s3", replica(durable=1))], "s3"),
        ([node("s3", replica()), node("s2", replica())], "s2"),
    ],
)
def test_who_takes_over(nodes, primary):
    assert promotion(plan(shard("s1 s2 s3"), node("s1", **GONE), *nodes)).primary == primary


def test_primaries_of_a_dead_node_spread_over_the_others():
    keys = [ShardKey(7, n) for n in range(4)]
    shards = [shard("s1 s2 s3", key=key) for key in keys]
    others = [node(name, *(replica(key) for key in keys)) for name in ("s2", "s3")]
    found = plan(shards, node("s1", **GONE), *others)
    assert [action.primary for action in found.actions] == ["s2", "s3", "s2", "s3"]


@pytest.mark.parametrize("outsider", ["joining", "stale", "leaving"])
def test_only_a_node_in_sync_is_promoted(outsider):
    lists = {"joining": ("s3", ""), "stale": ("", ""), "leaving": ("", "s3")}[outsider]
    found = plan(shard("s1 s2", *lists), node("s1", **GONE), node("s2", **GONE), *sound("s3"))
    assert not any(isinstance(action, Promote) for action in found.actions)
    worst = found.findings[0]
    assert worst.state is Health.RED
    assert "Start one of these nodes again with its data folder: s1, s2." in worst.reason
    assert ("lack acknowledged writes" in worst.reason) == (outsider == "stale")


def test_a_stopped_primary_is_replaced():
    broken = node("s1", replica(stopped="log/3: bad crc"))
    found = promotion(plan(shard("s1 s2"), broken, *sound("s2"), held_s=3))
    assert found.in_sync == ("s2",)
    assert "log/3: bad crc" in found.reason


def test_a_primary_whose_replica_is_missing_may_be_opening_it():
    assert not plan(shard("s1 s2"), node("s1"), *sound("s2"), held_s=29).actions
    assert promotion(plan(shard("s1 s2"), node("s1"), *sound("s2"), held_s=31)).primary == "s2"


def test_stopped_after_missing_counts_anew():
    broken = node("s1", replica(stopped="bad crc"))
    missing: Fact = ("missing", KEY, "s1", 4)
    stopped: Fact = ("stopped", KEY, "s1", 4)
    found = plan(shard("s1 s2"), broken, *sound("s2"), held={missing: 60, stopped: 1})
    assert not found.actions


def test_a_full_disk_hands_over_and_stays_in_sync():
    full = node("s1", replica(writable=False))
    also_full = node("s2", replica(writable=False, durable=99))
    found = promotion(plan(shard("s1 s2 s3"), full, also_full, *sound("s3")))
    assert (found.primary, found.in_sync) == ("s3", ("s3", "s2", "s1"))
    assert not plan(shard("s1 s2 s3"), full, *sound("s2", "s3"), held_s=2).actions


def test_a_full_disk_without_a_way_out_is_red():
    full = node("s1", replica(writable=False))
    found = plan(shard("s1 s2"), full, node("s2", replica(writable=False)))
    assert not found.actions
    assert found.findings[0].state is Health.RED
    assert "Free disk space on s1" in found.findings[0].reason


def test_a_process_of_another_role_is_no_storage_node():
    other = NodeRecord(id="s2", role=NodeRole.COORDINATOR, incarnation="i")
    found = plan(shard("s1 s2"), node("s1", **GONE), NodeView("s2", other, {KEY: replica()}))
    assert not found.actions


# -- copies that come -----------------------------------------------------------------------------
def only(found: Plan) -> Action:
    assert len(found.actions) == 1, found
    return found.actions[0]


def test_a_returning_copy_joins_at_once():
    found = only(plan(shard("s1 s2"), *sound("s1", "s2", "s3"), node("s4"), held_s=0))
    assert isinstance(found, AddJoining)
    assert found.node == "s3"
    assert changed(shard("s1 s2").record, found).joining == ["s3"]


@pytest.mark.parametrize(
    ("stale", "first"),
    [
        ([node("s4", replica(durable=5)), node("s5", replica(durable=6))], "s5"),
        ([node("s4", replica(durable=5, term=3)), node("s5", replica(durable=6))], "s4"),
        ([node("s4", replica(durable=0, term=3)), node("s5", replica(durable=6))], "s5"),
        ([node("s4", replica(durable=0, term=3))], "s4"),
        ([node("s4", replica(stopped="bad")), node("s5", replica(durable=1))], "s5"),
        ([node("s4", replica(writable=False)), node("s5", replica(durable=1))], "s5"),
        ([node("s4", replica(), lease=False), node("s5", replica(durable=1))], "s5"),
    ],
)
def test_which_copy_returns_first(stale, first):
    found = only(plan(shard("s1 s2"), *sound("s1", "s2"), *stale))
    assert isinstance(found, AddJoining)
    assert found.node == first


def test_a_new_copy_waits_for_the_old_one_to_come_back():
    nodes = [*sound("s1", "s2"), node("s3", **GONE), node("s4")]
    waiting = plan(shard("s1 s2"), *nodes, held_s=59)
    assert not waiting.actions
    assert "another node gets a copy in 1 s" in waiting.findings[0].reason
    found = only(plan(shard("s1 s2"), *nodes, held_s=60))
    assert isinstance(found, AddJoining)
    assert found.node == "s4"


@pytest.mark.parametrize(
    "useless",
    [
        node("s4", draining=True),
        node("s4", replica(ShardKey(8, 0), writable=False)),
        node("s4", answers=False),
        node("s4", lease=False),
    ],
)
def test_nodes_that_get_no_new_copy(useless):
    found = plan(shard("s1 s2"), *sound("s1", "s2"), useless)
    assert not found.actions
    assert any("start another storage node" in each.reason for each in found.findings)


def test_a_damaged_copy_makes_room_for_a_new_one():
    damaged = node("s4", replica(stopped="bad crc"))
    found = only(plan(shard("s1 s2"), *sound("s1", "s2"), damaged))
    assert isinstance(found, Leave)
    assert found.node == "s4"
    assert "damaged" in found.reason
    dead_primary = [node("s1", **GONE), *sound("s2")]
    assert not any(
        isinstance(action, Leave) for action in plan(shard("s1 s2"), *dead_primary, damaged).actions
    )


def test_a_new_copy_goes_to_another_zone_and_to_the_emptiest_node():
    nodes = [node("s1", replica(), zone="a"), node("s2", replica(), zone="b")]
    busy = ShardKey(9, 0)
    both = [shard("s1 s2"), shard("s5 s6", wanted=2, key=busy)]
    nodes.append(node("s6", replica(busy), zone="b"))
    zones = [node("s4", zone="a"), node("s5", replica(busy), zone="c")]
    found = plan(both, *nodes, *zones)
    assert [action.node for action in found.actions] == ["s5"]
    flat = [node("s4"), node("s5", replica(busy))]
    found = plan(both, *nodes, *flat)
    assert [action.node for action in found.actions] == ["s4"]


def test_nobody_joins_while_the_primary_is_away():
    found = plan(shard("s1"), node("s1", **GONE), *sound("s2"), node("s3"))
    assert not found.actions


def test_new_copies_are_limited_per_node_and_in_all():
    keys = [ShardKey(7, n) for n in range(50)]
    shards = [shard(f"p{n % 25} q{n}", key=key, wanted=3) for n, key in enumerate(keys)]
    nodes = [node(f"q{n}", replica(keys[n])) for n in range(50)]
    nodes += [node(f"p{n}", replica(keys[n]), replica(keys[n + 25])) for n in range(25)]
    one = plan(shards, *nodes, node("new"))
    receives = [action.node for action in one.actions if isinstance(action, AddJoining)]
    assert len(receives) == limits.JOINS_MAX
    assert max(map(receives.count, receives)) <= limits.JOINS_PER_NODE_MAX
    lonely = [shard(f"p q{n}", key=key, wanted=3) for n, key in enumerate(keys)]
    nodes = [node("p", *(replica(key) for key in keys)), *nodes[:50], node("new")]
    sent = plan(lonely, *nodes).actions
    assert len(sent) == limits.JOINS_PER_NODE_MAX


def test_returning_copies_are_limited_per_node_only():
    keys = [ShardKey(7, n) for n in range(60)]
    shards = [shard("s1 s2", key=key) for key in keys]
    nodes = [node(name, *(replica(key) for key in keys)) for name in ("s1", "s2", "s3")]
    found = plan(shards, *nodes)
    assert len(found.actions) == limits.RETURNS_PER_NODE_MAX
    assert {action.node for action in found.actions} == {"s3"}


def test_the_shard_with_the_fewest_copies_comes_first():
    low, lower = ShardKey(7, 0), ShardKey(7, 1)
    shards = [shard("s1 s2", key=low), shard("s1", key=lower)]
    nodes = [node("s1", replica(low), replica(lower)), node("s2", replica(low)), node("s3")]
    found = plan(shards, *nodes)
    assert [action.key for action in found.actions] == [lower, low]


def test_a_dead_joiner_makes_room():
    found = only(plan(shard("s1 s2", "s3"), *sound("s1", "s2"), node("s3", **GONE)))
    assert isinstance(found, CancelJoining)
    assert changed(shard("s1 s2", "s3").record, found).joining == []


@pytest.mark.parametrize(
    ("joiner", "cancelled"),
    [
        (node("s3", replica(role="joining")), False),
        (node("s3"), False),  # it has not heard of it yet
        (node("s3", replica(), lease=False), False),
        (node("s3", replica(), answers=False), False),
        (node("s3", replica(lost_s=21), lease=False), True),
        (node("s3", replica(stopped="bad crc")), True),
        (node("s3", replica(writable=False)), True),
    ],
)
def test_which_joiners_make_room(joiner, cancelled):
    found = plan(shard("s1 s2", "s3"), *sound("s1", "s2"), joiner, held_s=600)
    assert bool(found.actions) == cancelled


def test_a_joiner_that_stands_still_makes_room():
    stuck = node("s3", replica(durable=5, role="joining"))
    assert not plan(shard("s1 s2", "s3"), *sound("s1", "s2"), stuck, held_s=3_599).actions
    found = only(plan(shard("s1 s2", "s3"), *sound("s1", "s2"), stuck, held_s=3_601))
    assert isinstance(found, CancelJoining)


@pytest.mark.parametrize(("primary", "joiner"), [("", "s1"), ("s3", "")])
def test_replicas_that_cannot_read_each_other_do_not_stall_in_silence(primary, joiner):
    nodes = [
        node("s1", replica(unread=primary)),
        *sound("s2"),
        node("s3", replica(durable=5, role="joining", unread=joiner)),
    ]
    waiting = plan(shard("s1 s2", "s3"), *nodes, held_s=59)
    assert not waiting.actions
    assert any("cannot read what" in each.reason for each in waiting.findings)
    found = only(plan(shard("s1 s2", "s3"), *nodes, held_s=61))
    assert isinstance(found, CancelJoining)
    assert "cannot read each other" in found.reason


def test_a_copy_that_comes_back_replaces_a_new_one_that_has_nothing_yet():
    empty = node("s4", replica(durable=0, role="joining"))
    nodes = [*sound("s1", "s2", "s3"), empty]
    found = only(plan(shard("s1 s2", "s4"), *nodes, held_s=5))
    assert isinstance(found, CancelJoining)
    assert found.node == "s4"
    then = only(plan(shard("s1 s2"), *nodes, held_s=5))
    assert isinstance(then, AddJoining)
    assert then.node == "s3"
    assert not plan(shard("s1 s2", "s3"), *nodes, held_s=5).actions


def setback(count: int, ago_s: float, name: str = "s3") -> dict[tuple[ShardKey, str], Setback]:
    return {(KEY, name): Setback(count, NOW - ago_s)}


@pytest.mark.parametrize("rest", [(replica(durable=0),), (replica(durable=5),), ()])
def test_a_node_that_could_not_take_a_copy_is_not_given_it_again_at_once(rest):
    """Its disk fills up while it copies, and is emptied by giving up."""
    nodes = [*sound("s1", "s2"), node("s3", *rest)]
    for count, pause_s in ((1, 30), (2, 60), (5, 480), (9, 3_600), (9_999, 3_600)):
        waits = plan(shard("s1 s2"), *nodes, setbacks=setback(count, pause_s - 1))
        assert not waits.actions, count
        if count == 2:
            assert (
                "s3 could not take one before; it is tried again in 1 s" in waits.findings[0].reason
            )
        found = only(plan(shard("s1 s2"), *nodes, setbacks=setback(count, pause_s)))
        assert isinstance(found, AddJoining)
        assert found.node == "s3"


def test_another_node_is_preferred_to_one_that_could_not_take_a_copy():
    nodes = [*sound("s1", "s2"), node("s3", replica(durable=5)), node("s4")]
    found = only(plan(shard("s1 s2"), *nodes, setbacks=setback(1, 0)))
    assert isinstance(found, AddJoining)
    assert found.node == "s4"
    # … and it does not drive that one out before its time.
    empty = node("s4", replica(durable=0, role="joining"))
    nodes = [*sound("s1", "s2"), node("s3", replica(durable=5)), empty]
    assert not plan(shard("s1 s2", "s4"), *nodes, setbacks=setback(1, 0), held_s=5).actions


def test_what_counts_as_a_setback():
    gone = only(plan(shard("s1 s2", "s3"), *sound("s1", "s2"), node("s3", replica(writable=False))))
    assert isinstance(gone, CancelJoining)
    assert gone.failed
    nodes = [*sound("s1", "s2", "s3"), node("s4", replica(durable=0, role="joining"))]
    outdone = only(plan(shard("s1 s2", "s4"), *nodes, held_s=5))
    assert isinstance(outdone, CancelJoining)
    assert not outdone.failed


def test_setbacks_are_forgotten():
    kept = {**setback(3, 0), **setback(2, 0, "s2"), (ShardKey(9, 9), "s3"): Setback(1, NOW)}
    view = ClusterView(NOW, [shard("s1 s2")], {}, setbacks={**kept, **setback(3, 99, "s4")})
    assert lasting(view, 99) == setback(3, 0)


# -- copies that go -------------------------------------------------------------------------------
def test_a_surplus_copy_leaves():
    found = only(plan(shard("s1 s2 s3"), *sound("s1", "s2", "s3", "s4")))
    assert isinstance(found, Leave)
    assert found.node == "s4"
    assert changed(shard("s1 s2 s3").record, found).leaving == ["s4"]


def test_a_damaged_surplus_copy_leaves_too():
    found = only(plan(shard("s1", wanted=1), *sound("s1"), node("s2", replica(stopped="bad"))))
    assert isinstance(found, Leave)


@pytest.mark.parametrize(
    "weak",
    [
        node("s3", **GONE),
        node("s3", replica(), answers=False),
        node("s3", replica(), lease=False),
        node("s3"),
        node("s3", replica(stopped="bad crc")),
    ],
)
def test_no_copy_leaves_while_one_in_sync_is_in_doubt(weak):
    assert not plan(shard("s1 s2 s3"), *sound("s1", "s2"), weak, *sound("s4")).actions


def test_no_copy_leaves_while_one_is_missing():
    found = plan(shard("s1 s2", "s3"), *sound("s1", "s2", "s3", "s4"))
    assert not any(isinstance(action, Leave) for action in found.actions)


def test_a_node_that_is_leaving_is_not_told_twice():
    assert not plan(shard("s1 s2 s3", "", "s4"), *sound("s1", "s2", "s3", "s4")).actions


def test_a_healthy_cluster_needs_nothing():
    found = plan(shard("s1 s2 s3"), *sound("s1", "s2", "s3"), node("s4"))
    assert found == Plan((), ())


def test_actions_made_from_another_record_are_refused():
    record = shard("s1 s2").record
    for action in (
        Promote(KEY, 1, "s3", ("s3",), 5, ""),
        Promote(KEY, 1, "s2", ("s2",), 6, ""),
        Promote(KEY, 1, "s2", ("s2", "s9"), 5, ""),
        AddJoining(KEY, 1, "s2", ""),
        CancelJoining(KEY, 1, "s2", ""),
        Leave(KEY, 1, "s1", ""),
    ):
        with pytest.raises(InvariantError):
            changed(record, action)


# -- what holds for any view ----------------------------------------------------------------------
NAMES = ["s1", "s2", "s3", "s4", "s5"]
KEYS = [ShardKey(7, n) for n in range(3)]


@st.composite
def replica_states(draw: st.DrawFn, key: ShardKey) -> ReplicaStatus:
    return replica(
        key,
        role=draw(st.sampled_from(["primary", "secondary", "joining", "stopped"])),
        term=draw(st.integers(1, 5)),
        durable=draw(st.integers(0, 3)),
        writable=draw(st.booleans()),
        lost_s=draw(st.sampled_from([0.0, 5.0, 25.0])),
        stopped=draw(st.sampled_from([None, None, "bad crc"])),
    )


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    shards = []
    for key in KEYS[: draw(st.integers(1, 3))]:
        names = draw(st.permutations(NAMES))
        cuts = sorted(draw(st.lists(st.integers(1, 5), min_size=3, max_size=3)))
        lists = [names[: cuts[0]], names[cuts[0] : cuts[1]], names[cuts[1] : cuts[2]]]
        texts = [" ".join(each) for each in lists]
        shards.append(shard(*texts, wanted=draw(st.integers(1, 4)), key=key))
    nodes = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        held = [draw(replica_states(key)) for key in KEYS if draw(st.booleans())]
        nodes[name] = node(name, *held, lease=draw(st.booleans()), answers=draw(st.booleans()))
    view = ClusterView(NOW, shards, nodes)
    ages = st.sampled_from([0.0, 4.0, 70.0, 5_000.0])
    return replace(
        view, since={fact: NOW - draw(ages) for fact in sorted(remember(view), key=repr)}
    )


@settings(max_examples=200, deadline=None)
@given(views(), st.randoms(use_true_random=False))
def test_rules_that_hold_for_any_view(view: ClusterView, dice: random.Random):
    found = decide(view, RULES)
    by_key = {each.key: each for each in view.shards}
    assert len({action.key for action in found.actions}) == len(found.actions)
    for action in found.actions:
        seen = by_key[action.key]
        assert action.revision == seen.revision
        assert action.reason.endswith(".")
        record = changed(seen.record, action)  # checks term, in-sync set and membership
        assert set(record.in_sync) <= set(seen.record.in_sync)
        assert record.primary in record.in_sync
        if isinstance(action, Promote):
            assert view.node(action.primary).in_touch
            assert view.node(action.primary).sound_replica(action.key) is not None
            old = view.node(seen.record.primary)
            trouble = old.replica(action.key)
            assert not (old.registered and not old.answered)
            if trouble is not None and old.registered:
                assert trouble.info.stopped or trouble.role == "stopped" or not trouble.writable
        elif isinstance(action, AddJoining):
            assert view.node(action.node).in_touch
            assert len(seen.record.in_sync) + len(seen.record.joining) < seen.wanted
            assert view.node(seen.record.primary).in_touch
        elif isinstance(action, Leave):
            assert len(seen.record.in_sync) >= seen.wanted
            assert all(view.node(name).in_touch for name in seen.record.in_sync)
    shuffled = list(view.nodes.items())
    dice.shuffle(shuffled)
    upside_down = replace(view, nodes=dict(shuffled), shards=view.shards[::-1])
    assert decide(upside_down, RULES) == found


@given(views())
@settings(max_examples=100, deadline=None)
def test_what_was_just_seen_for_the_first_time_moves_no_primary(view: ClusterView):
    """A monitor that has just begun knows nothing of the past: only a node's own word counts."""
    for action in decide(replace(view, since={}), RULES).actions:
        if isinstance(action, Promote):
            assert "no metadata store" in action.reason
        assert not isinstance(action, CancelJoining) or (
            "came back" in action.reason or "no metadata store" in action.reason
        )


# -- stories --------------------------------------------------------------------------------------
@dataclass
class World:
    """Nodes that die and come back, primaries that do their duty, and the monitor, in steps of 1 s.

    `data[key][node]` is the last sequence number there; every write is acknowledged by all in sync.
    """

    seed: int
    now_s: float = 0.0
    records: dict[ShardKey, ShardView] = field(default_factory=dict)
    data: dict[ShardKey, dict[str, int]] = field(default_factory=dict)
    acknowledged: dict[ShardKey, int] = field(default_factory=dict)
    dead_since: dict[str, float] = field(default_factory=dict)
    since: dict[Fact, float] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        for key in KEYS:
            names = self.dice.sample(NAMES, 3)
            self.records[key] = shard(" ".join(names), key=key, term=1)
            self.data[key] = dict.fromkeys(names, 0)
            self.acknowledged[key] = 0

    def alive(self, name: str) -> bool:
        return name not in self.dead_since

    def _node(self, name: str) -> NodeView:
        held = [
            replica(key, durable=data[name], term=self.records[key].record.term)
            for key, data in self.data.items()
            if name in data
        ]
        dead_s = self.now_s - self.dead_since.get(name, self.now_s)
        return node(name, *held, lease=dead_s < 10, answers=self.alive(name))

    def _put(self, key: ShardKey, record: ShardRecord) -> None:
        seen = self.records[key]
        self.records[key] = replace(seen, record=record, revision=seen.revision + 1)

    def step(self) -> None:
        self.now_s += 1
        for key in KEYS:
            self._primary_does(key)
        view = ClusterView(
            self.now_s,
            list(self.records.values()),
            {name: self._node(name) for name in NAMES},
            self.since,
        )
        self.since = remember(view)
        for action in decide(view, RULES).actions:
            self.actions.append(action)
            self._put(action.key, changed(self.records[action.key].record, action))
            if isinstance(action, Promote):
                held = self.data[action.key][action.primary]
                assert held >= self.acknowledged[action.key], f"seed {self.seed}: a write is lost"

    def _primary_does(self, key: ShardKey) -> None:
        record, data = self.records[key].record, self.data[key]
        for name in record.leaving:
            if self.alive(name):
                data.pop(name, None)
                self._put(key, record.model_copy(update={"leaving": []}))
                return
        if not self.alive(record.primary):
            return
        for name in record.in_sync:
            if not self.alive(name):
                left = [each for each in record.in_sync if each != name]
                self._put(key, record.model_copy(update={"in_sync": left}))
                return
        self.acknowledged[key] += 1
        for name in record.in_sync:
            data[name] = self.acknowledged[key]
        for name in record.joining:
            if self.alive(name):
                data[name] = self.acknowledged[key]
                lists = {"in_sync": [*record.in_sync, name], "joining": []}
                if self.dice.random() < 0.3:
                    self._put(key, record.model_copy(update=lists))


@pytest.mark.parametrize("seed", range(30))
def test_any_story_ends_whole_and_loses_nothing(seed: int):
    print(f"seed {seed}")
    world = World(seed)
    for _ in range(400):
        world.step()
        if world.dice.random() < 0.05:
            name = world.dice.choice(NAMES)
            if world.alive(name):
                world.dead_since[name] = world.now_s
            else:
                del world.dead_since[name]
    world.dead_since.clear()
    for _ in range(200):
        world.step()
    for key in KEYS:
        record = world.records[key].record
        assert len(record.in_sync) == 3, f"seed {seed}: {record}"
        assert record.joining == record.leaving == []
        assert set(world.data[key]) == set(record.in_sync)
    quiet = len(world.actions)
    for _ in range(100):
        world.step()
    assert len(world.actions) == quiet, f"seed {seed}: {world.actions[quiet:]}"


def test_one_node_that_stays_away_is_replaced_by_another():
    world = World(1)
    record = world.records[KEY].record
    world.dead_since[record.primary] = world.now_s
    for _ in range(120):
        world.step()
    healed = world.records[KEY].record
    assert record.primary not in healed.in_sync
    assert len(healed.in_sync) == 3
    assert healed.term == 2
