"""Noisy linear imputation: what takes the place of removed voxels tells nothing, and leaves no edges."""

from typing import Any

import torch
from torch import Tensor

from esegeta import harmonic, random
from esegeta.coalitions import Fill
from esegeta.engine import check


def imputed(*, noise: float = 0.01, spacing: Any = None, steps: int = 12, key: Any = 0) -> Fill:
    r"""Return a fill: every hidden voxel becomes the weighted mean of its neighbours, plus a little noise.

    .. math:: f_v = \sum_u w_{vu} f_u / \sum_u w_{vu} + \epsilon_v, \qquad w_{vu} = 1 / |v - u|^2

    with 8 neighbours in the plane (1/6 and 1/12) and 26 in space (3/44, 3/88 and 1/44 for cubic voxels); beyond the
    border there are none, and the others weigh more. The equations are solved together, without noise, which is added
    afterwards. Where nothing of a channel is left it is the baseline.

    Args:
        noise: standard deviation, as a fraction of the range of the channel.
        spacing: mm per voxel, one per spatial axis.
        steps: of the solver.
        key: of the noise.

    Returns:
        ``(x, baseline, keep) -> like x``.

    Example:
        >>> x, keep = torch.tensor([[0.0, 9.0, 9.0, 3.0]]), torch.tensor([[1.0, 0.0, 0.0, 1.0]])
        >>> torch.allclose(imputed(noise=0.0)(x, 0 * x, keep), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        True

    Reference:
        Rong, Leemann, Borisov, Kasneci, Kasneci 2022, ROAD, arXiv:2202.00449.
    """
    where = "metrics.imputed"
    share = check.non_negative(where, "noise", noise)
    check.positive_count(where, "steps", steps)
    word = check.key(where, key)

    def fill(x: Tensor, baseline: Tensor, keep: Tensor) -> Tensor:
        lengths = check.spacing(where, spacing, x.ndim - 1).tolist()
        hidden = (keep < 1).expand(x.shape)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        found = harmonic.impute(wide, hidden, lengths, steps).to(x.dtype)
        nothing = hidden.flatten(1).all(1).reshape(-1, *[1] * (x.ndim - 1))
        found = torch.where(nothing, baseline, found)
        if share:
            flat = x.flatten(1)
            range_ = (flat.amax(1) - flat.amin(1)).reshape(-1, *[1] * (x.ndim - 1))
            drawn = random.normal(word, x.shape, dtype=x.dtype, device=x.device)
            found = found + share * range_ * drawn
        return torch.where(hidden, found, x)

    return fill
