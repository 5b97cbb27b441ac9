"""What went between this process and each storage node, counted, and as Prometheus text.

Counting costs an addition or two for each request; nothing is kept per request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Traffic", "traffic_lines"]


@dataclass(slots=True)
class Traffic:
    """Of one node, since this process began; its address may change meanwhile.

    requests    that were put on their way; again: those of them that were sent a second time
    busy        refused here, because too many waited
    late        whose time passed without an answer; lost: connections that ended
    sent_bytes, received_bytes  of requests and answers, without what gRPC adds
    waiting     requests without an answer; queued_bytes: of those, not yet sent. As of when
                `Nodes.traffic` was called
    """

    requests: int = 0
    again: int = 0
    busy: int = 0
    late: int = 0
    lost: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    waiting: int = 0
    queued_bytes: int = 0


_SHOWN = (  # (attribute, name, type, help)
    ("requests", "requests_total", "counter", "Reads and writes of shards that were asked."),
    ("again", "resent_total", "counter", "Requests that were sent again after a lost connection."),
    ("busy", "busy_total", "counter", "Requests refused because too many waited for the node."),
    ("late", "late_total", "counter", "Requests whose time passed without an answer."),
    ("lost", "lost_connections_total", "counter", "Connections that ended."),
    ("sent_bytes", "sent_bytes_total", "counter", "Bytes of requests."),
    ("received_bytes", "received_bytes_total", "counter", "Bytes of answers."),
    ("waiting", "waiting", "gauge", "Requests without an answer."),
    ("queued_bytes", "queued_bytes", "gauge", "Bytes of requests that are not yet sent."),
)


def traffic_lines(nodes: Mapping[str, Traffic]) -> Iterator[str]:
    """nodes: by node id."""
    for attribute, name, kind, text in _SHOWN:
        yield f"# HELP shoal_node_{name} {text}"
        yield f"# TYPE shoal_node_{name} {kind}"
        for node in sorted(nodes):
            yield f'shoal_node_{name}{{node="{node}"}} {getattr(nodes[node], attribute)}'
