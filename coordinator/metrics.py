"""Counts and latencies of requests, and the state of the data, as Prometheus text.

One object serves both APIs of a process. HTTP counts by operation and status (`query`, 200), gRPC by
method and status code (`Points/Search`, OK), each item of a stream for itself.

One request costs a dictionary look-up and a bisection, about 0.5 µs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from coordinator.copier import Progress
from shoal.health import Health, HealthReport

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

# Upper bounds in seconds: a search takes a fraction of a millisecond, a bulk write a second.
_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class _Histogram:
    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS_S) + 1)
        self.sum_s = 0.0


class Metrics:
    """Since the start of the process. more: lines of other parts of it, made when they are asked."""

    def __init__(self, more: Callable[[], Iterable[str]] = tuple) -> None:
        self._more = more
        self._requests: dict[tuple[str, int | str], int] = {}
        self._latencies: dict[str, _Histogram] = {}
        self.in_flight = 0

    def observe(self, operation: str, status: int | str, seconds: float) -> None:
        key = (operation, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        histogram = self._latencies.get(operation)
        if histogram is None:
            histogram = self._latencies[operation] = _Histogram()
        histogram.buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        histogram.sum_s += seconds

    def render(
        self,
        report: HealthReport,
        extra_requests: Mapping[str, int],
        migrations: Mapping[tuple[str, str], Progress],
    ) -> bytes:
        """extra_requests: of the router, by kind. migrations: by collection and vector."""
        lines = [*self._request_lines(), *_extra_lines(extra_requests), *_state_lines(report)]
        lines += _migration_lines(migrations)
        lines += self._more()
        return ("\n".join(lines) + "\n").encode()

    def _request_lines(self) -> Iterator[str]:
        yield "# HELP shoal_requests_total Requests answered, by operation and status."
        yield "# TYPE shoal_requests_total counter"
        for (operation, status), count in sorted(self._requests.items()):
            labels = f'operation="{operation}",status="{status}"'
            yield f"shoal_requests_total{{{labels}}} {count}"
        yield "# HELP shoal_request_seconds Time from the first byte of a request to its answer."
        yield "# TYPE shoal_request_seconds histogram"
        for operation, histogram in sorted(self._latencies.items()):
            total = 0
            for bound, count in zip((*_BOUNDS_S, "+Inf"), histogram.buckets, strict=True):
                total += count
                labels = f'operation="{operation}",le="{bound}"'
                yield f"shoal_request_seconds_bucket{{{labels}}} {total}"
            yield f'shoal_request_seconds_sum{{operation="{operation}"}} {histogram.sum_s:.6f}'
            yield f'shoal_request_seconds_count{{operation="{operation}"}} {total}'
        yield "# HELP shoal_requests_in_flight Requests being answered now."
        yield "# TYPE shoal_requests_in_flight gauge"
        yield f"shoal_requests_in_flight {self.in_flight}"


def _extra_lines(counts: Mapping[str, int]) -> Iterator[str]:
    yield (
        "# HELP shoal_extra_requests_total Requests to storage nodes beyond the first: to a second "
        "replica because the first was late (hedge), again after an error (retry)."
    )
    yield "# TYPE shoal_extra_requests_total counter"
    for kind, count in sorted(counts.items()):
        yield f'shoal_extra_requests_total{{kind="{kind}"}} {count}'


def _state_lines(report: HealthReport) -> Iterator[str]:
    yield "# HELP shoal_health 0 green, 1 yellow, 2 red."
    yield "# TYPE shoal_health gauge"
    yield f"shoal_health {list(Health).index(report.state)}"
    if report.disk is not None:
        yield "# HELP shoal_disk_free_bytes Free space where the data is."
        yield "# TYPE shoal_disk_free_bytes gauge"
        yield f"shoal_disk_free_bytes {report.disk.free_bytes}"
    gauges = (
        ("points", "Points."),
        ("indexed_vectors", "Vectors in segments that have an index."),
        ("segments", "Segments."),
        ("pending", "Segments that wait for a merge or an index."),
        ("applied", "Log sequence number of the last write."),
        ("bytes_on_disk", "Bytes on disk."),
    )
    for field, text in gauges:
        yield f"# HELP shoal_shard_{field} {text}"
        yield f"# TYPE shoal_shard_{field} gauge"
        for shard in report.shards:
            if shard.info is not None:
                labels = f'collection="{_escaped(shard.collection)}",shard="{shard.key.shard}"'
                yield f"shoal_shard_{field}{{{labels}}} {getattr(shard.info, field)}"


def _migration_lines(migrations: Mapping[tuple[str, str], Progress]) -> Iterator[str]:
    shown: tuple[tuple[str, str, str, Callable[[Progress], float]], ...] = (
        (
            "copied_total",
            "counter",
            "Points that got a vector of the other model.",
            lambda p: p.copied,
        ),
        ("without_text", "gauge", "Points that cannot be copied.", lambda p: p.without_text),
        ("points_per_second", "gauge", "Points copied per second, of late.", lambda p: p.rate),
        ("failing", "gauge", "1 while something keeps it from going on.", lambda p: bool(p.error)),
    )
    for name, kind, text, value in shown:
        yield f"# HELP shoal_migration_{name} {text}"
        yield f"# TYPE shoal_migration_{name} {kind}"
        for (collection, vector), progress in sorted(migrations.items()):
            labels = f'collection="{_escaped(collection)}",vector="{_escaped(vector)}"'
            yield f"shoal_migration_{name}{{{labels}}} {round(value(progress), 1)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
