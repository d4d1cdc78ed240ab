"""Networks with their dropout active: the random model of Monte-Carlo dropout."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from esegeta import random
from esegeta._registry import uncertainty
from esegeta.engine import check, levels
from esegeta.engine.dropping import Diverged, Dropping, Tape, Uneven, dropping
from esegeta.engine.folded import fold
from esegeta.engine.native import Arrange, Call, Native, Pick, each, name_of, pick


def kept(keys: Tensor, number: int, count: int, rate: float, device: torch.device) -> Tensor:
    """Return which elements one dropout keeps for each of the keys: (keys, count), boolean.

    >>> found = kept(torch.tensor([3, 4]), 0, 10_000, 0.25, torch.device("cpu")).float().mean(1)
    >>> bool(((found - 0.75).abs() < 0.02).all())
    True
    """
    least = round(rate * 2**16) - 2**15
    if least == 2**15:
        return torch.zeros(len(keys), count, dtype=torch.bool, device=device)
    # Sixteen bits an element, four of them a word: a word for each would take as long as a third of the network.
    draw = lambda key: random.bits(random.fold_in(key, number), (-(-count // 4),), device=device)
    return vmap(draw)(keys).view(torch.int16)[:, :count] >= least


class DropoutModel:
    """A network whose dropout is active, as a random function of one example. Made by ``dropout``."""

    def __init__(
        self,
        module: Callable[..., Any],
        output: Pick,
        rate: Mapping[str, float],
        native: Native | None = None,
        tape: Tape | None = None,
    ) -> None:
        self.module, self.output, self.rate = module, output, dict(rate)
        self._native = Native(module, output) if native is None else native
        self._tape = tape

    def __repr__(self) -> str:
        added = f", rate={self.rate!r}" if self.rate else ""
        return f"dropout({name_of(self.module)}{added})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew from a copy of the network."""
        return DropoutModel, (self.module, self.output, self.rate)

    @property
    def label(self) -> str:
        """Name what its draws are: those of the dropout that the network was trained with, or others."""
        if not self.rate:
            return "dropout of the network"
        places = ", ".join(f"{place} ({rate:g})" for place, rate in self.rate.items())
        return f"dropout put in at {places}: not Bayesian"

    def repeating(self) -> "DropoutModel":
        """Return the same for many draws of one input: what comes before the first dropout is computed once."""
        return DropoutModel(self.module, self.output, self.rate, self._native, Tape())

    def __call__(self, *inputs: Any, key: random.Key | None = None) -> Tensor:
        """Run one example through the network with the masks of the key."""
        here = "dropout"
        word = random.fold_in(check.key(here, key), 0)
        leaves, spec = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            got = ", ".join(map(check.describe, leaves)) or "nothing"
            raise check.refused_type(here, "at least one tensor", got, "Pass one example without batch axis")
        self._native.refuse_training()
        self._native.check_dtype_and_device(tensors)
        self._native.refuse_missing_channels(tensors, spec)

        def run(*given: Tensor, full: bool = False) -> tuple[Tensor, ...]:
            found = iter(given)
            own = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            whole, call = [*own, given[-1]], self._pass(spec)
            try:
                self._native.settle(whole, call)
                return self._native(whole, call, full)
            except Uneven:
                self._native.one_at_a_time = True
                return self._native(whole, call, full)

        name = name_of(self.module)
        whole = functools.partial(run, full=True)
        try:
            return fold(run, name, host=self._native.host, full=whole)(*tensors, word)[0]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            told = self._native.misfit(tensors, error)
            if told is None:
                raise
            raise told from error

    def _pass(self, spec: Any) -> Call:
        """Return the network as a function of a batch with its keys."""

        def call(leaves: list[Any], arrange: Arrange) -> tuple[Tensor, ...]:
            *own, keys = leaves
            inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]
            tape = self._tape
            # A value that is kept has no graph.
            usable = tape is not None and tape.usable and not torch.is_grad_enabled()
            if not usable or any(map(levels.fake, inputs)):
                tape = None
            repeating = tape is not None and tape.holds(inputs)
            if tape is not None and not repeating:
                tape.begin()
            try:
                return self._once(own, keys, inputs, arrange, spec, tape, repeating)
            except Diverged:
                assert tape is not None
                tape.usable = False
                return self._once(own, keys, inputs, arrange, spec, None, False)

        return call

    def _once(
        self,
        own: list[Any],
        keys: Tensor,
        inputs: list[Tensor],
        arrange: Arrange,
        spec: Any,
        tape: Tape | None,
        repeating: bool,
    ) -> tuple[Tensor, ...]:
        mode = Dropping(kept, keys, tape, repeating, inputs)
        module: Any = getattr(self.module, "_orig_mod", self.module)
        arguments = tree_unflatten(each(own, arrange), spec)
        with dropping(mode, module, self.rate, "dropout"):
            y = module(*arguments)
        y = pick(y, self.output, self._native.name)
        if not mode.calls:
            expected = "a network that calls dropout with a rate above zero"
            advice = "Put it in at places that you name, rate={'bottom': 0.2}; that is not Bayesian"
            raise check.refused("dropout", expected, f"{self._native.name}, which calls none", advice)
        if tape is not None:
            tape.check()
        return (self._native.checked(y, len(keys)),)


@uncertainty(
    family="draws", paper="Gal, Ghahramani 2016, arXiv:1506.02142", also=("test_time_dropout",), leads=1
)
def dropout(
    module: Callable[..., Any], *, output: Pick = None, rate: Mapping[str, float | int] | None = None
) -> DropoutModel:
    r"""Make a random model of a network: its dropout is active, and only that.

    .. math:: (x, key) \mapsto f(x; M_1(key), M_2(key), \ldots)

    Dropout of modules and of functional calls, of whole channels, of SELU networks, and stochastic depth
    (``DropPath``, ``StochasticDepth``) all count. Batch norm stays in evaluation mode. The network itself is never
    changed. Rates are rounded to multiples of 2^-16. Dropout inside of fused attention stays off, since torch shows
    no mask there.

    Without ``rate`` the draws approximate the posterior of a network that was trained with this dropout. With it
    there is more dropout, behind the modules that you name: then the spread tells how the answer depends on what
    those modules compute, and is not Bayesian. The ``label`` of the model says which of them it is.

    Args:
        module: in evaluation mode; whatever ``from_module`` takes and runs in Python.
        output: which tensor of the result to take, as in ``from_module``.
        rate: of dropout put in, by the name of the module whose output is dropped.

    Returns:
        Random model ``(x, key=) -> (K,*S)``: the same key gives the same masks, whatever goes through beside it.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).eval()
        >>> model = dropout(net)
        >>> x = torch.ones(4)
        >>> ratio = model(x, key=3) / net(x)
        >>> set(ratio.round().tolist()) <= {0.0, 2.0}, torch.equal(model(x, key=3), model(x, key=3))
        (True, True)

    Reference: Gal, Ghahramani, Dropout as a Bayesian approximation, ICML 2016.
    """
    here = "dropout"
    if isinstance(module, torch.export.ExportedProgram):
        advice = "Pass the module that it was made from"
        raise check.refused_type(here, "a module that runs in Python", "an exported program", advice)
    if not callable(module):
        advice = "Pass the network itself"
        raise check.refused_type(here, "a module or another callable", check.describe(module), advice)
    added = {} if rate is None else rate
    if not isinstance(added, Mapping):
        advice = "Pass for example {'encoder.1': 0.2}"
        raise check.refused_type(here, "rate to name places", check.describe(rate), advice)
    for place, one in added.items():
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one < 1:
            raise check.refused(here, f"a rate from 0 to below 1 at {place!r}", repr(one), "0.2 is usual")
    if added and not isinstance(module, torch.nn.Module):
        advice = "Only modules have names to put dropout in at"
        raise check.refused_type(here, "an nn.Module where rate is given", check.describe(module), advice)
    return DropoutModel(module, output, {place: float(one) for place, one in added.items()})
