"""A network as one operator on windows: run on the part of the image that a change reaches, and no further."""

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from esegeta.engine.locality import Locality
from esegeta.engine.windows import Missing, TooWide, Window, fit, region

# An opaque network counts as this many multiplications for an element.
OPAQUE = 1e3


def through(model: Callable[[Tensor], Tensor], x: Window, locality: Locality) -> Window:
    """Return ``model``, from (C,*S) to (K,*S), on crops that begin at multiples of its shift period."""
    run = x.run
    step = run.next("crops")
    shape = tuple(x.shape[1:])
    ends = np.array(
        [
            [locality.affected(a, int(low), int(low) + n, length) for a, (low, n, length) in enumerate(each)]
            for each in (list(zip(lo[1:], x.extent[1:], shape, strict=True)) for lo in x.lo)
        ]
    )
    lo, size = fit(ends[..., 0], ends[..., 1], shape)
    alike: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    for b in range(len(lo)):
        needed = [locality.needs(a, int(lo[b, a]), int(lo[b, a]) + n, shape[a]) for a, n in enumerate(size)]
        alike[tuple(high - low for low, high in needed)].append((b, [low for low, _ in needed]))
    share = sum(math.prod(extent) * len(members) for extent, members in alike.items()) / len(lo)
    if share > run.most * math.prod(shape):
        raise TooWide(f"changes that each need {100 * share / math.prod(shape):.0f} % of the image")
    if run.recording:
        with torch.no_grad():
            whole = model(x.clean[0])
        run.kept[step] = (whole[None],)
        run.kinds.append(((tuple(whole.shape), whole.dtype),))
        run.whole += OPAQUE * x.numel()
        run.read.update((x.at, (step, 0)))
    if step not in run.kept:
        raise Missing
    clean = run.kept[step][0]
    assert clean is not None
    out = torch.empty((len(lo), clean.shape[1], *size), dtype=clean.dtype, device=clean.device)
    for extent, members in alike.items():
        parts = [
            region(one_of(x, b), np.array([[0, *start]]), (x.shape[0], *extent))[0].contiguous()
            for b, start in members
        ]
        run.cost += OPAQUE * sum(p.numel() for p in parts)
        with torch.no_grad():
            answers = torch.func.vmap(model)(torch.stack(parts))
        for (b, start), answer in zip(members, answers, strict=True):
            where = [
                slice(int(low - s), int(low - s) + n) for low, s, n in zip(lo[b], start, size, strict=True)
            ]
            out[b] = answer[(slice(None), *where)]
    offsets = np.concatenate([np.zeros((len(lo), 1), dtype=np.int64), lo], 1)
    made = Window(run, (step, 0), tuple(clean.shape[1:]), clean, offsets, out)
    if run.commits is not None:
        run.commits.append(made)
    return made


def one_of(x: Window, b: int) -> Window:
    """Return one of the changes that a window holds, as a window of its own."""
    clean = None if x.clean_ is None else x.clean_[b % len(x.clean_)][None]
    return Window(x.run, x.at, tuple(x.shape), clean, x.lo[b : b + 1], x.patch[b : b + 1])
