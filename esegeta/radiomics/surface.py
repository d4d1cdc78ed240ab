"""The surface of an object on a grid: marching cubes, and marching squares in the plane.

The tables of the 256 (16) ways in which the corners of a cell lie inside or outside are made here, once: the borders
of inside and outside on the faces of the cell are joined to loops, and loops are cut into triangles. Where a face has
two corners of each kind on its diagonals, the corners inside are connected, on both sides of the face alike, so that
the surface is closed.
"""

import functools
import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Edge = tuple[int, int]

# The corners of a face of the unit square in the order in which they are walked around.
_AROUND = ((0, 0), (1, 0), (1, 1), (0, 1))


def _corner(bits: tuple[int, ...]) -> int:
    """The number of a corner: its coordinates as binary digits."""
    return sum(bit << axis for axis, bit in enumerate(bits))


def _faces(ndim: int) -> list[list[int]]:
    """The square faces of a cell as corners, walked counter-clockwise seen from outside; the square is its own."""
    if ndim == 2:
        return [[_corner(corner) for corner in _AROUND]]
    faces = []
    for axis, side in itertools.product(range(3), (0, 1)):
        first, second = (axis + 1) % 3, (axis + 2) % 3  # right-handed with the axis
        around = _AROUND if side else _AROUND[::-1]
        corners = [{axis: side, first: a, second: b} for a, b in around]
        faces.append([_corner((c[0], c[1], c[2])) for c in corners])
    return faces


def _segments(face: list[int], inside: list[bool]) -> list[tuple[Edge, Edge]]:
    """The borders of inside and outside on a face: one for each run of corners outside."""

    def edge(position: int) -> Edge:
        a, b = face[position % 4], face[(position + 1) % 4]
        return (min(a, b), max(a, b))

    flags = [inside[corner] for corner in face]
    found = []
    for start in range(4):
        if not flags[start] and flags[start - 1]:
            end = start
            while not flags[(end + 1) % 4]:
                end += 1
            found.append((edge(start - 1), edge(end)))
    return found


@functools.cache
def _table(ndim: int) -> list[list[tuple[Edge, ...]]]:
    """For each way in which corners lie inside: the simplices of the surface, each a tuple of crossed edges."""
    faces = _faces(ndim)
    table: list[list[tuple[Edge, ...]]] = []
    for code in range(2 ** (2**ndim)):
        inside = [bool(code >> corner & 1) for corner in range(2**ndim)]
        following = dict(segment for face in faces for segment in _segments(face, inside))
        if ndim == 2:
            table.append([*following.items()])
            continue
        simplices: list[tuple[Edge, ...]] = []
        while following:
            first, second = following.popitem()
            loop = [first, second]
            while loop[-1] != first:
                loop.append(following.pop(loop[-1]))
            simplices += _fan(loop[:-1])
        table.append(simplices)
    return table


def _fan(loop: list[Edge]) -> list[tuple[Edge, ...]]:
    """Cut a loop into triangles around one of its points: the one with which the surface encloses most.

    The points of a loop rarely lie in a plane, so that the choice matters; consensus values were found with this one.
    """
    middle = (
        np.array([[sum(corner >> axis & 1 for corner in edge) / 2 for axis in range(3)] for edge in loop])
        - 0.5
    )
    fans = []
    for start in range(len(loop)):
        order = [(start + n) % len(loop) for n in range(len(loop))]
        fan = [(order[0], order[n + 1], order[n]) for n in range(1, len(loop) - 1)]
        fans.append((round(float(np.linalg.det(middle[np.array(fan)]).sum()), 9), fan))
    best = max(fans, key=lambda found: found[0])[1]
    return [(loop[a], loop[b], loop[c]) for a, b, c in best]


def surface(field: Array, level: float, spacing: Array) -> Array:
    """Find the surface where a field on a grid crosses a level; beyond the grid the field counts as outside.

    Args:
        field: (*S) with two or three axes; inside is where it is above the level.
        level: where the surface lies.
        spacing: mm per voxel.

    Returns:
        Simplices (n, axes, axes): segments in the plane, triangles in space, as corner points in mm from the centre
        of the first voxel. They are oriented: determinants add up to the content that is enclosed.

    Example:
        >>> one = surface(np.ones((1, 1, 1)), 0.5, np.ones(3))  # an octahedron with half axes of half a voxel
        >>> len(one), round(content(one), 6), round(size(one), 6)
        (8, 0.166667, 1.732051)
    """
    ndim = field.ndim
    below = min(float(field.min()), level) - 2 * max(1.0, abs(level))
    # A field of 0 and 1 is crossed half-way at its borders, too.
    outside = 2 * level - 1.0 if set(np.unique(field)) <= {0.0, 1.0} else below
    padded = np.pad(field, 1, constant_values=outside)
    cells = tuple(n - 1 for n in padded.shape)
    corners = [tuple(number >> axis & 1 for axis in range(ndim)) for number in range(2**ndim)]
    values = np.stack(
        [padded[tuple(slice(o, o + n) for o, n in zip(c, cells, strict=True))] for c in corners]
    )
    codes = np.zeros(cells, dtype=np.int64)
    for number, value in enumerate(values):
        codes |= (value > level).astype(np.int64) << number
    found = []
    table = _table(ndim)
    for code in np.unique(codes):
        if not table[code]:
            continue
        where = np.nonzero(codes == code)
        base = np.stack(where, axis=-1).astype(np.float64) - 1.0
        here = values.reshape(len(values), -1)[:, codes.reshape(-1) == code]
        for simplex in table[code]:
            points = []
            for low, high in simplex:
                share = (level - here[low]) / (here[high] - here[low])
                start, end = np.array(corners[low], float), np.array(corners[high], float)
                points.append((base + start + share[:, None] * (end - start)) * spacing)
            found.append(np.stack(points, axis=1))
    return np.concatenate(found) if found else np.zeros((0, ndim, ndim))


def content(simplices: Array) -> float:
    """Return the volume, or in the plane the area, that a surface encloses."""
    if not len(simplices):
        return 0.0
    centred = simplices - simplices.reshape(-1, simplices.shape[-1]).mean(0)
    return float(np.linalg.det(centred).sum() / math.factorial(simplices.shape[-1]))


def size(simplices: Array) -> float:
    """Return the area of a surface, or in the plane the length of a border."""
    if not len(simplices):
        return 0.0
    edges = simplices[:, 1:] - simplices[:, :1]
    gram = np.einsum("nid,njd->nij", edges, edges)
    determinants = np.clip(np.linalg.det(gram), 0.0, None)
    return float(np.sqrt(determinants).sum() / math.factorial(simplices.shape[-1] - 1))
