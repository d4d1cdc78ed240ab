"""Scores that are made of scores: as functions, and as networks where all that they are made of are networks."""

from collections.abc import Callable

from torch import Tensor, nn

from esegeta._facts import declare, declared
from esegeta._types import Score


class Composed(nn.Module):
    """A network of batches that is put together from networks as the score is from scores."""

    def __init__(self, how: Callable[..., Score], networks: list[nn.Module]) -> None:
        super().__init__()
        self.how, self.networks = how, nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B,C,*S) -> (B,)``."""
        return self.how(*self.networks)(x)


def composed(how: Callable[..., Score], *scores: Score) -> Score:
    """Return ``how(*scores)``, with a ``module`` for those who look for layers in it.

    Args:
        how: from scores to a score; what it does to an image it does to a stack of images too.
        scores: with or without ``module``, a network ``(B,C,*S) -> (B,)``.

    Returns:
        A score.

    Example:
        >>> import torch
        >>> from esegeta._facts import facts_of
        >>> double = composed(lambda f: lambda z: 2 * f(z), lambda z: z.sum())
        >>> double(torch.ones(1, 3)).item(), facts_of(double).module
        (6.0, None)
    """

    def score(z: Tensor) -> Tensor:
        return how(*scores)(z)

    networks = [declared(s).module for s in scores]
    if all(isinstance(n, nn.Module) for n in networks):
        return declare(score, module=Composed(how, networks))
    return score
