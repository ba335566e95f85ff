"""Finding places for the labels of points, so that none covers another.

Runs of one scheme have one size, so their points stand close above each other and labels all on one side would collide.
Every label tries places to the left and right of its point, above and below it, near and far; the cheapest is where it
covers nothing, its leader crosses nothing, and it is near. A few rounds let labels placed early make room, and the
best of a few orders is taken.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_BESIDE = (10.0, 26.0, 46.0, 70.0, 100.0, 140.0)
_STEP, _STEPS = 9.0, 14
_ROUNDS = 4
_SAMPLE = 3.0
# What a covered unit of area and a covered part of a leader cost, in units of distance.
_AREA_COST, _LEADER_COST = 4.0, 30.0
_CROSSING_COST = 200.0
_ABOVE_OR_BELOW_COST = 8.0


Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle, in pixels or points, y upward."""

    left: float
    bottom: float
    right: float
    top: float


class Place(NamedTuple):
    """Where a label goes.

    Attributes:
        box: What it covers.
        end: Where the line to its point ends, on the edge of the box.
    """

    box: Box
    end: Point


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[Point],
    inside: Box,
    obstacles: Sequence[Box] = (),
    radius: float = 6.0,
    unit: float = 1.0,
) -> list[Place]:
    """Place a label beside every point.

    Args:
        points: The points.
        sizes: Width and height of their labels.
        inside: What the labels may not leave.
        obstacles: What labels may not cover and leaders may.
        radius: Half the size of a point's mark.
        unit: The length of a point (1/72 inch) in these coordinates.
    """
    marks = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    downward = sorted(range(len(points)), key=lambda i: -points[i][1])
    rightward = sorted(range(len(points)), key=lambda i: points[i][0])
    candidates = [
        sorted(_candidates(point, size, unit), key=lambda place: math.dist(point, place.end))
        for point, size in zip(points, sizes, strict=True)
    ]
    found = []
    for order in (downward, downward[::-1], rightward, rightward[::-1]):
        places: dict[int, tuple[float, Place]] = {}
        for _ in range(_ROUNDS):
            before = dict(places)
            for i in order:
                others = {j: place for j, (_, place) in places.items() if j != i}
                leaders = [(points[j], place.end) for j, place in others.items()]
                boxes = [place.box for place in others.values()]
                covered = np.array([*boxes, *obstacles, *marks, *_as_boxes(leaders, unit)])
                crossed = np.array([*boxes, *(mark for j, mark in enumerate(marks) if j != i)]).reshape(-1, 4)
                places[i] = (math.inf, Place(inside, points[i]))
                for place in candidates[i]:
                    if math.dist(points[i], place.end) >= places[i][0]:
                        break  # they come near ones first, and no further one can be cheaper
                    cost = _cost(place, points[i], inside, covered, crossed, leaders, unit)
                    if cost < places[i][0]:
                        places[i] = (cost, place)
            if places == before:
                break
        found.append((sum(cost for cost, _ in places.values()), [places[i][1] for i in range(len(points))]))
    return min(found)[1]


def _candidates(point: Point, size: Point, unit: float) -> Iterator[Place]:
    (x, y), (width, height) = point, size
    for beside in _BESIDE:
        for step in range(-_STEPS, _STEPS + 1):
            middle = y + step * _STEP * unit
            right, left = x + beside * unit, x - beside * unit
            yield Place(Box(right, middle - height / 2, right + width, middle + height / 2), (right, middle))
            yield Place(Box(left - width, middle - height / 2, left, middle + height / 2), (left, middle))
    for step in range(1, _STEPS + 1):
        above, below = y + step * _STEP * unit, y - step * _STEP * unit
        yield Place(Box(x - width / 2, above, x + width / 2, above + height), (x, above))
        yield Place(Box(x - width / 2, below - height, x + width / 2, below), (x, below))


def _cost(
    place: Place,
    point: Point,
    inside: Box,
    covered: npt.NDArray[np.float64],
    crossed: npt.NDArray[np.float64],
    leaders: Sequence[tuple[Point, Point]],
    unit: float,
) -> float:
    box = place.box
    outside = (box.right - box.left) * (box.top - box.bottom) - common_area(box, inside)
    widths = np.minimum(covered[:, 2], box.right) - np.maximum(covered[:, 0], box.left)
    heights = np.minimum(covered[:, 3], box.top) - np.maximum(covered[:, 1], box.bottom)
    area = max(0.0, outside) + float((widths.clip(min=0) * heights.clip(min=0)).sum())
    samples = np.array(list(_along(point, place.end, _SAMPLE * unit))).reshape(-1, 1, 2)
    hits = ((crossed[:, :2] < samples) & (samples < crossed[:, 2:])).all(-1).any(-1).sum()
    crossings = sum(_cross(point, place.end, *leader) for leader in leaders)
    return (
        _AREA_COST * area
        + _LEADER_COST * float(hits)
        + _CROSSING_COST * crossings
        + math.dist(point, place.end)
        + _ABOVE_OR_BELOW_COST * (place.end[0] == point[0])
    )


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def common_area(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.top, other.top) - max(one.bottom, other.bottom)
    return width * height if width > 0 and height > 0 else 0.0


def _along(start: Point, end: Point, every: float) -> Iterator[Point]:
    samples = max(1, int(math.dist(start, end) / every))
    for i in range(1, samples):
        share = i / samples
        yield start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _as_boxes(lines: Sequence[tuple[Point, Point]], unit: float) -> Iterator[Box]:
    for start, end in lines:
        for x, y in _along(start, end, _SAMPLE * unit):
            yield Box(x - unit, y - unit, x + unit, y + unit)
