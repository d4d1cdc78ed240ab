"""Owen values: Shapley values of parts that join in groups, over a tree of groups."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from esegeta import coalitions
from esegeta._registry import Cost, method
from esegeta._types import Explain, Score
from esegeta.engine import check, progress
from esegeta.engine.execution import DeadlineExceeded, record_partial
from esegeta.features import Features, elements
from esegeta.methods import hierarchy

# Groups with what was present before them: number, what was present, the scores before and after, the weight.
Found = tuple[Tensor, ...]


@method(
    refs=("baseline",),
    axioms=(
        "completeness sensitivity_a implementation_invariance shift scale_of_output "
        "efficiency_of_regions class_sensitivity"
    ),
    needs="values",
    example={"max_runs": 64},
    family="parts",
    cost=lambda max_runs: Cost(forwards=max_runs),
    paper="Owen 1977, doi:10.1007/978-3-642-45494-3_7",
    also=("owen_values", "partition_explainer", "hierarchical_shap"),
)
def partition_shap(
    score: Score,
    *,
    features: Features | None = None,
    tree: hierarchy.Tree | None = None,
    max_runs: int = 1000,
) -> Explain:
    r"""Explain by what a part adds to the score, over the orders in which groups of a tree enter as blocks.

    .. math:: a_j = E_\pi \left[ v(\{i : \pi_i \le \pi_j\}) - v(\{i : \pi_i < \pi_j\}) \right], \qquad
              \pi \text{ uniform on orders that leave each group together}

    A group is split by what each of its halves adds before and after the other one. Exact once all groups are
    split, which takes about :math:`d^2` runs for d parts of a balanced tree; until then those are split first that
    are worth most, and the parts of a group that was not split share its value equally. The sum is F(x) - F(x')
    with any number of runs, also where a deadline makes them fewer.

    Args:
        score: ``(C,*S) -> ()``; no derivative is needed.
        features: which parts, by ``esegeta.features``; by default every element, for small images.
        tree: the groups as nested sequences of part numbers, such as ``((0, 1), (2, (3, 4)))`` or
            ``hierarchy.of_labels(lobes, regions)``; by default the box of the parts is halved along its longest axis,
            again and again. A group of more than two is halved in its order.
        max_runs: number of runs of the score.

    Returns:
        ``explain(x, baseline) -> like x``, the value of a part at each of its elements.

    Example:
        >>> import torch
        >>> explain = partition_shap(lambda x: x.prod(), tree=(0, (1, 2)))
        >>> explain(torch.ones(1, 3), torch.zeros(1, 3)).tolist()
        [[0.5, 0.25, 0.25]]

    Reference:
        Owen 1977, Values of games with a priori unions; trees: Winter 1989, doi:10.1007/BF01268984; splitting by
        value: the partition explainer of the shap package.
    """
    label = "partition_shap"
    splits = check.positive_count(label, "max_runs", max_runs, 2) // 2 - 1

    def explain(x: Float[Tensor, "*dims"], baseline: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        parts = coalitions.parts(
            label, elements() if features is None else features, x, runs=lambda _: max_runs
        )
        leaves, groups, levels = hierarchy.binary(range(parts.count) if tree is None else tree)
        if sorted(leaves, key=str) != sorted(range(parts.count), key=str):
            expected, got = f"a tree of the features 0 to {parts.count - 1}", f"{leaves!s:.60}"
            raise check.refused(label, expected, got, "Name every feature once, as a whole number")
        place = torch.arange(parts.count, device=x.device)
        rank = torch.argsort(
            hierarchy.halved(parts, place) if tree is None else torch.tensor(leaves).to(place)
        )
        start, end, first, second = torch.tensor(groups, device=x.device).T

        def inside(group: Tensor) -> Tensor:
            return (place >= start[group][:, None]) & (place < end[group][:, None])

        def values(present: Tensor) -> Tensor:
            rows = present.index_select(1, rank).to(x.dtype)
            return coalitions.values(score, x, baseline, parts, rows, label=label).double()

        def split(found: Found, size: int) -> Found:
            worth = torch.where(first[found[0]] == found[0], -1, found[4] * (found[3] - found[2]).abs())
            dearest = worth.detach().sort(descending=True, stable=True).indices
            group, before, low, high, weight = (t[dearest[:size]] for t in found)
            with_a, with_b = before | inside(first[group]), before | inside(second[group])
            v = values(rearrange([with_a, with_b], "two pair part -> (pair two) part"))
            done = len(v) // 2  # fewer than asked for at a deadline
            group, before, with_a, with_b, low, high, weight = (
                t[:done] for t in (group, before, with_a, with_b, low, high, weight)
            )
            one, other = rearrange(v[: 2 * done], "(pair two) -> two pair", two=2)
            a, b = first[group], second[group]
            # Each half before and after the other. A leaf is its own halves, and keeps its value.
            new = (
                torch.cat([a, a, b, b]),
                torch.cat([before, with_b, before, with_a]),
                torch.cat([low, other, low, one]),
                torch.cat([one, high, other, high]),
                (weight / 2).repeat(4),
            )
            return tuple(torch.cat([t[dearest[done:]], n]) for t, n in zip(found, new, strict=True))

        ends = values(torch.stack([place < 0, place >= 0]))
        if len(ends) < 2:
            raise DeadlineExceeded(f"{label}: the deadline passed before the second run. Allow more time.")
        found: Found = (0 * place[:1], (place < 0)[None], ends[:1], ends[1:], torch.ones_like(ends[1:]))
        with progress.loop(label) as bar:
            sizes = hierarchy.rounds(levels, splits)
            try:
                for i, size in enumerate(sizes):
                    with progress.step(bar, i / len(sizes), (i + 1) / len(sizes)):
                        found = split(found, size)
            except DeadlineExceeded:
                pass  # the groups so far add up to the whole, too
        done, asked = (len(found[0]) - 1) // 3, sum(sizes)  # one group becomes four
        if done < asked:
            message = f"{label}: the deadline passed; {done} of {asked} groups are split."
            record_partial(message, done, asked, (done + 1) / (asked + 1))
        group, _, low, high, weight = found
        share = weight * (high - low) / (end - start)[group]
        total = (share @ inside(group).double()).index_select(0, rank)
        return parts.spread(total.to(x.dtype)).expand_as(x).clone()

    return explain
