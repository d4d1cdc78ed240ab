"""Which tiles a change meets, against sets of elements."""

import itertools

import pytest
import torch

from esegeta.engine.tiles import Tiling

LIKE = torch.zeros(1, dtype=torch.float64)


def elements(box):
    return set(itertools.product(*(range(s.start, s.stop) for s in box)))


@pytest.mark.parametrize(
    ("grid", "patch", "overlap", "steps"),
    [((11,), (4,), 0.5, "even"), ((9,), (3,), 0.0, "fixed"), ((7, 6), (4, 3), 0.25, "fixed")],
)
def test_touched_are_the_tiles_that_share_an_element(grid, patch, overlap, steps):
    tiling = Tiling(grid, patch, overlap, "average", steps, LIKE)
    assert set().union(*map(elements, tiling.boxes)) == elements([slice(0, n) for n in grid])
    for extent in itertools.product(*(range(1, n + 1) for n in patch)):
        for low in itertools.product(*(range(n - m + 1) for n, m in zip(grid, extent, strict=True))):
            change = elements([slice(a, a + m) for a, m in zip(low, extent, strict=True)])
            expected = [i for i, box in enumerate(tiling.boxes) if change & elements(box)]
            assert tiling.touched(low, extent) == expected
            begin, end = tiling.around(expected)
            held = set().union(*(elements(tiling.boxes[i]) for i in expected))
            whole = elements([slice(a, z) for a, z in zip(begin, end, strict=True)])
            assert held <= whole
            assert all(min(e[k] for e in held) == begin[k] for k in range(len(grid)))
            assert all(max(e[k] for e in held) == end[k] - 1 for k in range(len(grid)))
