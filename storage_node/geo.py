"""The three geographic conditions, for one point and for many at once.

Both forms decide alike to the last bit, because a filter must not depend on whether a point lies in
a column or is read from its payload: boxes and polygons use only operations that IEEE 754 rounds in
one way, and a radius is decided by the one-point form wherever the vector form could err.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.api.filter import GeoBoundingBox, GeoLine, GeoPolygon, GeoRadius

__all__ = ["Area", "Box", "Circle", "Polygon", "geo_point"]

EARTH_RADIUS_M = 6_371_008.8  # mean radius, IUGG

Degrees = NDArray[np.float64]
Mask = NDArray[np.bool_]


def geo_point(value: Any) -> tuple[float, float] | None:
    """(lon, lat) of a payload value {"lon": number, "lat": number, …}, or None if it is no such."""
    if type(value) is not dict:
        return None
    lon: Any = value.get("lon")
    lat: Any = value.get("lat")
    if type(lon) not in (int, float) or type(lat) not in (int, float):
        return None
    try:
        lon, lat = float(lon), float(lat)
    except OverflowError:
        return None
    return (lon, lat) if math.isfinite(lon) and math.isfinite(lat) else None


class Area(Protocol):
    def holds(self, lon: float, lat: float) -> bool: ...

    def holds_many(self, lon: Degrees, lat: Degrees) -> Mask:
        """(n,), (n,) float64 degrees -> (n,) bool."""
        ...


class Box:
    """Strictly inside; with the left edge east of the right one it crosses the antimeridian."""

    def __init__(self, box: GeoBoundingBox) -> None:
        self._west, self._east = box.top_left.lon, box.bottom_right.lon
        self._north, self._south = box.top_left.lat, box.bottom_right.lat

    def holds(self, lon: float, lat: float) -> bool:
        if self._west > self._east:
            inside = lon > self._west or lon < self._east
        else:
            inside = self._west < lon < self._east
        return inside and self._south < lat < self._north

    def holds_many(self, lon: Degrees, lat: Degrees) -> Mask:
        east_of, west_of = lon > self._west, lon < self._east
        inside = east_of | west_of if self._west > self._east else east_of & west_of
        return inside & (lat > self._south) & (lat < self._north)


class Circle:
    """Nearer than the radius by the haversine formula."""

    def __init__(self, circle: GeoRadius) -> None:
        self._lon, self._lat = math.radians(circle.center.lon), math.radians(circle.center.lat)
        self._cos_lat = math.cos(self._lat)
        self._radius = circle.radius
        # numpy's sine may differ from math's in the last bit: 1e-9 m here, and up to 0.2 m next to
        # the antipode of the centre, where the formula is ill-conditioned.
        self._doubt_m = 1e-5 if circle.radius < 0.9 * math.pi * EARTH_RADIUS_M else 1.0

    def holds(self, lon: float, lat: float) -> bool:
        lon, lat = math.radians(lon), math.radians(lat)
        h = (
            math.sin((self._lat - lat) / 2) ** 2
            + math.cos(lat) * self._cos_lat * math.sin((self._lon - lon) / 2) ** 2
        )
        return EARTH_RADIUS_M * 2 * math.asin(min(1.0, math.sqrt(h))) < self._radius

    def holds_many(self, lon: Degrees, lat: Degrees) -> Mask:
        lon_r, lat_r = np.radians(lon), np.radians(lat)
        h = (
            np.sin((self._lat - lat_r) / 2) ** 2
            + np.cos(lat_r) * self._cos_lat * np.sin((self._lon - lon_r) / 2) ** 2
        )
        distance = EARTH_RADIUS_M * 2 * np.arcsin(np.minimum(1.0, np.sqrt(h)))
        inside: Mask = distance < self._radius
        for i in np.flatnonzero(np.abs(distance - self._radius) < self._doubt_m):
            inside[i] = self.holds(float(lon[i]), float(lat[i]))
        return inside


class Polygon:
    """Inside the outer ring (its edge is outside) and in no hole (the edge of a hole is inside the
    hole). Even-odd rule on plain degrees."""

    def __init__(self, polygon: GeoPolygon) -> None:
        self._outer = _corners(polygon.exterior)
        self._holes = [_corners(ring) for ring in polygon.interiors or ()]

    def holds(self, lon: float, lat: float) -> bool:
        return bool(self.holds_many(np.array([lon]), np.array([lat]))[0])

    def holds_many(self, lon: Degrees, lat: Degrees) -> Mask:
        inside = _in_ring(lon, lat, self._outer, edge=False)
        for ring in self._holes:
            inside &= ~_in_ring(lon, lat, ring, edge=True)
        return inside


Corners = list[tuple[float, float]]


def _corners(ring: GeoLine) -> Corners:
    """(lat, lon) of each corner once."""
    return [(point.lat, point.lon) for point in ring.points[:-1]]


def _in_ring(lon: Degrees, lat: Degrees, ring: Corners, *, edge: bool) -> Mask:
    """Whether each point is inside; a point on an edge counts as `edge` says."""
    inside = np.zeros(lon.shape, np.bool_)
    on_edge = np.zeros(lon.shape, np.bool_)
    for (lat1, lon1), (lat2, lon2) in zip(ring, [ring[-1], *ring[:-1]], strict=True):
        # Collinear with the edge and between its ends.
        cross = lon * (lat1 - lat2) + lon1 * (lat2 - lat) + lon2 * (lat - lat1)
        on_edge |= (
            (cross == 0) & ((lat1 - lat) * (lat2 - lat) <= 0) & ((lon1 - lon) * (lon2 - lon) <= 0)
        )
        if lon1 != lon2:  # a ray along the meridian crosses the edge north of the point
            crosses = (lon1 > lon) != (lon2 > lon)
            inside ^= crosses & (lat < (lat2 - lat1) * (lon - lon1) / (lon2 - lon1) + lat1)
    return np.where(on_edge, edge, inside)
