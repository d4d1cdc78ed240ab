r"""Places inside a score: named intermediate tensors, to look at, to cut at, to change.

A place is written ``path``, ``path#call``, ``path:leaf`` or both:

- ``encoder.2.conv``: the output of a module; ``encoder.2.conv#1`` that of its second call;
- ``block:1``, ``block:aux.0``: one tensor of a result that holds several;
- ``block.relu:in``: the input of a module, ``block.join:in.1`` one of several;
- ``block.add#1``: the second addition in the ``forward`` of ``block``, in whatever spelling;
- ``bottleneck``: what the code itself calls so, with ``mark(z, "bottleneck")``.

``places(score, x)`` lists them. The network is never changed, and everything here is a function like the
score: it can be mapped, differentiated and run from several threads.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from esegeta._facts import carry, explanation, facts_of, named
from esegeta._registry import find_method
from esegeta._types import Explain, Method, Score
from esegeta.engine import check, interception, levels, memory, native, views, visits
from esegeta.engine.execution import DeadlineExceeded, current, record
from esegeta.engine.gradient import name_of, value_gradients_and_more
from esegeta.engine.graph import Graph
from esegeta.engine.stitching import InTiles, SlidingWindow, frozen, met
from esegeta.engine.tiles import cut, patch_of
from esegeta.engine.views import Edit
from esegeta.trees import on_trees

Names = str | Sequence[str]
Rule = Callable[[Tensor, Tensor], Tensor]
Averaged = Callable[[Tensor, Tensor], Tensor | None]


_NONE = (
    "No place that the score depends on: nothing of its inside can be seen. TorchScript, exported programs, NumPy, "
    "ONNX and JAX show none; take the same network as a torch module, or a method without a place."
)


@dataclass(frozen=True)
class Place:
    """One place of a score, as ``places`` found it.

    name: how to ask for it, with ``#0`` if its path is passed several times; kind: "module", "operation" or
    "marker"; shape, dtype: of its tensor for one example; call: which call of its path; cut: whether all that the
    score knows of the input passes through it; beside: the places that carry the rest, which together with it are
    a cut; used: whether the score depends on it at all; same_as: the first name of this tensor, if it has one
    before this.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    call: int
    cut: bool
    beside: tuple[str, ...]
    used: bool
    same_as: str = ""

    def __str__(self) -> str:
        note = "cut" if self.cut else f"beside: {', '.join(self.beside)}" if self.used else "not used"
        return f"{self.name:<32} {self.kind:<10} {self.shape!s:<22} {note}"


class Places(tuple[Place, ...]):
    """Places in the order in which they are computed; prints as a table; ``found["name"]`` is one of them."""

    def __str__(self) -> str:
        table = "\n".join(map(str, self))
        return table if any(place.used for place in self) else f"{table}\n{_NONE}".lstrip()

    def __getitem__(self, which: Any) -> Any:
        if not isinstance(which, str):
            return super().__getitem__(which)
        with contextlib.suppress(ValueError):
            at = views.parse("places", which)
            for place in self:
                if views.parse("places", place.name) == at:
                    return place
        names = [place.name for place in self]
        raise KeyError(
            check.problem("places", "the name of a place", repr(which), views.nearest(which, names))
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(place.name for place in self)


def mark(z: Tensor, label: str) -> Tensor:
    """Give a value inside of a function a name, so that it is a place. It stays the same value.

    Args:
        z: the value.
        label: its name, without ``#`` and ``:``.

    Returns:
        z; or what replaces it.

    Example:
        >>> import torch
        >>> score = lambda x: (mark(2 * x, "double") ** 2).sum()
        >>> tap(score, "double")(torch.tensor([[1., 3.]])).tolist()
        [[2.0, 6.0]]
    """
    check.tensor("mark", "z", z)
    if not isinstance(label, str) or not label.strip() or label != label.strip() or set(label) & set("#:\n"):
        raise check.refused("mark", "a label, a word without # and :", repr(label), "Choose another")
    return interception.visit_marker(z, label)


def places(score: Callable[[Tensor], Tensor], x: Tensor) -> Places:
    r"""Return every place that a score passes for this input, in order.

    A place is a *cut* if every way from the input to the score leads through it: then the score is a function
    of this place alone. A layer beside a skip connection is none; ``beside`` then names the places that carry
    what bypasses it. What autograd does not see (``detach``, ``argmax``) is not counted as a way.

    Args:
        score: a score, or a model.
        x: an example. The score runs once, with a graph, outside of ``vmap`` and ``grad``.

    Returns:
        The places; they print as a table.

    Example:
        >>> import torch, esegeta as eg
        >>> from esegeta import zoo
        >>> score = eg.reducers.class_sum(eg.from_module(zoo.small_unet(2)), 1)
        >>> found = places(score, torch.rand(1, 8, 8))
        >>> found["bottom"].shape, found["bottom"].cut, found["bottom"].beside
        ((8, 4, 4), False, ('encoder',))
        >>> found["decoder"].cut
        True
    """
    check.runs("places", score)
    check.image("places", "x", x)
    if levels.depth():
        raise check.refused(
            "places", "to be called outside of vmap and grad", "a call inside", "List the places first"
        )
    graph = Graph(score, x)
    found = []
    for passed in graph.passed:
        beside = graph.beside([passed])
        found.append(
            Place(
                name=graph.label(passed),
                kind=passed.kind,
                shape=passed.shape,
                dtype=passed.dtype,
                call=passed.at.call,
                cut=graph.used(passed) and not beside,
                beside=beside,
                used=graph.used(passed),
                same_as=graph.first_name(passed),
            )
        )
    return Places(found)


def tap(score: Callable[..., Any], place: Names) -> Callable[..., Any]:
    r"""Return the activation at a place, as a function of the input: :math:`A(x)`.

    The score runs only as far as needed. It is a model like any other: a reducer on it explains a neuron.

    Args:
        score: a score or a model.
        place: one place, or several.

    Returns:
        ``x -> activation``, or a tuple of them for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 3, 1), torch.nn.ReLU())
        >>> tap(eg.from_module(net), "0")(torch.zeros(1, 5)).shape
        torch.Size([3, 5])
    """
    check.runs("tap", score)
    names, form = _names("tap", place)
    edits = [Edit(at, "tap") for at in names]
    say_which_calls = _passes("tap", score, names)

    def tapped(*inputs: Tensor) -> Any:
        try:
            found = interception.observe("tap", score, inputs, edits, stop=True)[1]
        except InTiles:
            if len(inputs) > 1 or not _alone(score):
                raise
            found = None
        if found is None:
            return form(_stitched_taps(score, names, *inputs))
        say_which_calls(*inputs)
        return form(found)

    return named(tapped, f"{name_of(score)} at {_text(place)}")


def replace(score: Callable[..., Tensor], place: Names) -> Callable[..., Tensor]:
    r"""Return the score with an activation put in at a place: :math:`F(x \mid A := z)`.

    Args:
        score: a score or a model.
        place: one place, or several.

    Returns:
        ``(x, z) -> F``; for several places z is a tuple.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") + x).sum()
        >>> replace(score, "double")(torch.ones(1, 1), torch.zeros(1, 1)).item()
        1.0
    """
    return _with("replace", score, place)


def nudge(score: Callable[..., Tensor], place: Names) -> Callable[..., Tensor]:
    r"""Return the score with something added at a place: :math:`F(x \mid A := A(x) + d)`.

    Its gradient for d at zero is the gradient for the activation, at the price of one run.

    Args:
        score: a score or a model.
        place: one place, or several.

    Returns:
        ``(x, d) -> F``, where d has the shape of the activation or broadcasts to it; for several places d is a
        tuple.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> torch.func.grad(lambda d: nudge(score, "double")(torch.ones(1, 1), d))(torch.zeros(1, 1)).item()
        4.0
    """
    return _with("nudge", score, place)


def split(
    score: Score, place: Names, *, at: Tensor | None = None
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    r"""Cut a score at a place: :math:`F = \mathrm{head} \circ \mathrm{trunk}`.

    ``head(trunk(x))`` is ``score(x)`` at every place, up to rounding: what is put in may lie otherwise in memory, and
    the operation after it then adds up in another order. The head on *other* activations needs to know the rest
    of what it reads: nothing if the place is a cut; else what bypasses the place comes from ``at``. Several
    places that are a cut together need no ``at`` either.

    Args:
        score: the score.
        place: one place, or several.
        at: the input that everything beside the place is frozen at.

    Returns:
        ``(trunk, head)``, ``x -> z`` and ``z -> F``; for several places z is a tuple.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> trunk, head = split(score, "double")
        >>> z = trunk(torch.tensor([[1., 3.]]))
        >>> z.tolist(), head(z).item(), head(torch.zeros(1, 2)).item()
        ([[2.0, 6.0]], 40.0, 0.0)
    """
    check.runs("split", score)
    names, form = _names("split", place)
    if at is not None:
        check.image("split", "at", at)
    put = replace(score, place)
    taps = [Edit(name, "tap") for name in names]
    say_which_calls = _passes("split", score, names)
    single = isinstance(place, str)
    # What a trunk returned belongs to the input that it came from for as long as somebody holds it.
    origin = _Origins()
    inputs: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    def trunk(x: Tensor) -> Any:
        _, found = interception.observe("split", score, (x,), taps, stop=True)
        say_which_calls(x)
        for z, name in zip(found, names, strict=True):
            if not z.is_floating_point():
                raise check.refused_type(
                    "split",
                    "a place with floating activations",
                    f"{check.describe(z)} at {str(name)!r}",
                    "Choose a place before the argmax, comparison or cast",
                )
            if z.ndim == 0:
                raise check.refused(
                    "split",
                    "a place inside of the network",
                    f"{str(name)!r}, a single number",
                    "Choose a place before the reducer",
                )
            origin.known[z] = x
        sizes = tuple(tuple(z.shape) for z in found)
        if at is None and sizes not in inputs:
            inputs[sizes] = torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)
        return form(found)

    def head(z: Any) -> Tensor:
        zs = (z,) if single else tuple(z)
        for given in zs:
            check.floating("split", "the activation", given)
        known = at if at is not None else origin.known.get(zs[0])
        if known is None:
            known = elsewhere(zs)
        return put(known, z)

    cuts: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    def elsewhere(zs: Sequence[Tensor]) -> Tensor:
        """Some input for the head of a cut, which does not matter; refused where it would."""
        sizes = tuple(tuple(z.shape) for z in zs)
        if sizes not in inputs:
            raise check.refused(
                "split",
                "an activation like those of the trunk, or at=x",
                f"{', '.join(map(str, sizes))} before any call of the trunk with such a result",
                "Call trunk(x) first, so that the size of the input is known, or pass at=x",
            )
        if sizes not in cuts:
            cuts[sizes] = _refuse_ways_around(score, put, trunk, names, place, inputs[sizes])
        return cuts[sizes]

    named(carry(head, score), f"{name_of(score)} from {_text(place)}")
    return named(trunk, f"trunk to {_text(place)}"), head


def at(method: Method | str, place: Names) -> Method:
    r"""Return the layer version of a method: it explains by the activations at a place instead of the input.

    .. math:: \mathrm{at}(M, l)(F)(x, x') = M(\mathrm{head}_l)(A_l(x), A_l(x'))

    Everything that bypasses the place stays as it is at x. A path method goes on a straight line between
    *activations*, so layer integrated gradients sum up to what changes if the place alone is switched from x
    to the baseline; for the path in the input there is ``conductance``.

    Args:
        method: ``Score -> Explain``, or the name of one.
        place: one place, or several; then explanations are tuples.

    Returns:
        A method; its explanations take x and references in the input space and are like the activation.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> explain = at(eg.integrated_gradients, "double")(score, steps=2)
        >>> explain(torch.ones(1, 2), torch.zeros(1, 2)).tolist()
        [[4.0, 4.0]]
    """
    method = find_method(method).fn if isinstance(method, str) else method
    check.function("at", "a method or the name of one", method, "Pass esegeta.gradient")
    names, _ = _names("at", place)
    chosen = method if isinstance(place, str) else on_trees(method)

    def layered(score: Score, **static: Any) -> Explain:
        def refuse_dead(x: Tensor) -> None:
            for name in names:
                refuse_unused("at", score, name, x)

        def explain(x: Tensor, *refs: Tensor, **extra: Any) -> Any:
            with check.calling("at", ["split"]):
                trunk, head = split(score, place, at=x)

                def inside(ref: Tensor) -> Any:
                    if not isinstance(ref, Tensor) or ref.shape == x.shape:
                        return trunk(ref)
                    return vmap(trunk)(ref) if ref.shape[1:] == x.shape else ref  # a stack of references

                zs = [trunk(x), *map(inside, refs)]
            try:
                a = chosen(head, **static)(*zs, **extra)
            except (ValueError, NotImplementedError):
                refuse_dead(x)  # the place is the reason, whatever the method says
                raise
            if not any(levels.true_anywhere(t.detach() != 0) for t in tree_leaves(a)):
                refuse_dead(x)
            return a

        plain = method(check.score("at", score), **static)
        facts, about = facts_of(plain), f"{name_of(method)} at {_text(place)}"
        if facts.refs is None:
            return named(carry(explain, plain), about)
        return explanation(explain, about, facts.refs, key=facts.key, doc=plain.__doc__)

    layered.__name__ = f"{name_of(method)} at {', '.join(map(str, names))}"
    return layered


def activation_and_gradient(score: Score, place: Names) -> Callable[[Tensor], tuple[Any, Any]]:
    r"""Return the activations :math:`A` at places and the gradients :math:`\partial F / \partial A`, in one pass.

    One forward and one backward run whatever the number of places. What most layer methods are made of.

    Args:
        score: the score.
        place: one place, or several.

    Returns:
        ``x -> (A, G)``; for several places two tuples.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> a, g = activation_and_gradient(score, "double")(torch.tensor([[1., 3.]]))
        >>> a.tolist(), g.tolist()
        ([[2.0, 6.0]], [[4.0, 12.0]])
    """
    both = _one_pass(score, place, "tap")
    return named(lambda x: both(x)[:2], f"activation_and_gradient({name_of(score)})")


def bias_and_gradient(score: Score, place: Names) -> Callable[[Tensor], tuple[Any, Any, Tensor]]:
    r"""Return what the operation at a place adds to its linear part, and the gradient there, in one pass.

    .. math:: b = f(z) - J_f(z) \, z

    for the operation f that computes the place from z, its weights fixed: the bias of a convolution, the shift of
    a norm, what bends an activation. Zero at places that are no single operation.

    Data are what is computed from the input; everything else that an operation is given counts as its weights.

    Args:
        score: the score.
        place: one place, or several.

    Returns:
        ``x -> (b, G, g)``; for several places two tuples, and the gradient for the input.

    Example:
        >>> import torch, esegeta as eg
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1), torch.nn.ReLU())
        >>> _ = net[0].bias.data.fill_(3.0)
        >>> b, g, _ = bias_and_gradient(eg.reducers.class_sum(eg.from_module(net.eval()), 1), "0")(torch.zeros(1, 2))
        >>> b.tolist(), g.tolist()
        ([[3.0, 3.0]], [[1.0, 1.0]])
    """
    return _one_pass(score, place, "bias")


def operations(score: Callable[[Tensor], Tensor], x: Tensor) -> tuple[str, ...]:
    """Return the places that are single operations or layers of torch: all that computes, each once.

    >>> import torch
    >>> operations(lambda x: torch.relu(x @ torch.ones(2, 3)).sum(), torch.ones(1, 2))
    ('matmul', 'relu')
    """
    with visits.aside():
        graph = native.outside(lambda: Graph(score, _probe(x)))
    return tuple(graph.label(p) for p in graph.passed if p.leaf and graph.used(p))


def _one_pass(
    score: Score, place: Names, what: Any, *, stitched: bool = True
) -> Callable[[Tensor], tuple[Any, Any, Any]]:
    where = "activation_and_gradient" if what == "tap" else "bias_and_gradient"
    check.score(where, score)
    names, form = _names(where, place)
    if what != "tap":
        # Names of operations come from a listing, not from a user who could mean another call.
        names = [dataclasses.replace(name, numbered=True) for name in names]
    shapes = _shapes(score, place)

    def both(x: Tensor) -> tuple[Any, Any, Any]:
        check.floating(where, "x", x)
        try:
            sizes = shapes(x)
        except InTiles:
            if what != "tap" or not stitched or not _alone(score):
                raise
            sizes = None
        if sizes is None:
            found, gradients, own = (*_stitched(score, names, x), None)
        else:
            found, gradients, own = pulled(where, score, names, sizes, x, what)
        for name, g in zip(names, gradients, strict=True):
            if not levels.true_anywhere(g.detach() != 0):
                refuse_unused("places", score, name, x)
        return form(found), form(gradients), own

    return named(both, f"{where}({name_of(score)})")


def tilewise(score: Score, place: Names, rule: Callable[..., Any]) -> Callable[..., Any]:
    r"""Return the sum over tiles of a stitched answer of what a rule makes of activation and gradient there.

    .. math:: \sum_i \rho(A_i, G_i), \qquad G_i = \frac{\partial}{\partial A_i} \langle n_i c, f(x|_{B_i}) \rangle,
              \quad c = \partial F / \partial y

    A rule of products adds up to what the products of all tiles do: those that a sum such as completeness needs,
    which products of stitched activations and gradients are not where tiles disagree.

    Args:
        score: a score that is made of one answer of ``models.sliding_window``.
        place: one place, or several, each varied while the others stay as they are.
        rule: of pairs (A, G), one for each input, a map like A; for several places of pairs of tuples, a tuple.

    Returns:
        ``(*xs) -> map``; for several places a tuple.
    """
    names, form = _names("places", place)

    def summed(*xs: Tensor) -> Any:
        wholes = [frozen("places", score, x) for x in xs]
        window = wholes[0].window
        sizes = tile_sizes(window, names, wholes[0].x)

        def one(weight: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            pairs = zip(given[: len(xs)], given[len(xs) :], strict=True)
            found = [look(of_tile(window, weight, c, score), patch) for patch, c in pairs]
            return tuple(tree_leaves(rule(*found)))

        def look(tile: Score, patch: Tensor) -> tuple[Any, Any]:
            if not isinstance(place, str):
                return partials(tile, place)(patch)
            (a,), (g,), _ = pulled("places", tile, names, sizes, patch)
            return a, g

        return form(window.gathered(vmap(one), *[w.x for w in wholes], *[w.cotangent for w in wholes]))

    return summed


def partials(score: Score, place: Names) -> Callable[[Tensor], tuple[Any, Any]]:
    r"""Return ``activation_and_gradient`` of several places, each varied while the others stay as they are.

    The same for one place, and for places of which none comes before another. Otherwise a gradient of
    ``activation_and_gradient`` includes what goes on through later places, which would be counted twice in
    sums over places.

    Args:
        score: the score.
        place: one place, or several.

    Returns:
        ``x -> (A, G)``; for several places two tuples.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(3 * eg.mark(2 * x, "first"), "second")).sum()
        >>> a, g = partials(score, ["first", "second"])(torch.ones(1, 1))
        >>> [t.item() for t in g]
        [0.0, 1.0]
    """
    if isinstance(place, str):
        one = _one_pass(score, place, "tap", stitched=False)
        return named(lambda x: one(x)[:2], f"partials({name_of(score)})")
    _names("partials", place)

    def both(x: Tensor) -> tuple[Any, Any]:
        trunk, head = split(score, place, at=x)
        zs = trunk(x)
        _, gradients, _ = value_gradients_and_more(lambda *z: (head(z), ()), name_of(score))(*zs)
        return zs, tuple(gradients)

    return named(both, f"partials({name_of(score)})")


def grid(a: Tensor) -> tuple[int, ...]:
    """Return the spatial axes of a feature map (D,*U); refused where there are none.

    >>> grid(torch.zeros(3, 4, 5))
    (1, 2)
    """
    if a.ndim < 2:
        raise check.refused(
            "places",
            "a layer with feature maps (D,*U)",
            f"an activation of shape {tuple(a.shape)}",
            "Choose a layer before pooling or flattening",
        )
    return tuple(range(1, a.ndim))


def local(
    score: Score,
    place: Names,
    rule: Rule,
    *,
    name: str = "",
    averaged: Averaged | None = None,
    tolerance: float = 0.0,
) -> Explain:
    """Return the explanation by a rule of activation and gradient; at several places in one pass.

    Args:
        score: the score.
        place: one place, or several.
        rule: ``(A, G) -> map``.
        name: of the method, for warnings.
        averaged: ``(A, G) ->`` what the rule adds up over the grid to weigh the channels, None where it adds up
            nothing: a warning says where nothing of these sums is left but rounding.
        tolerance: what of their size sums that are zero may have left besides rounding.

    Returns:
        ``x -> map``, or a tuple of maps for several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> local(score, "double", lambda a, g: a * g)(torch.ones(1, 2)).tolist()
        [[8.0, 8.0]]
    """
    both = activation_and_gradient(score, place)
    watches = [vanishing(name, score, p, tolerance) for p in ((place,) if isinstance(place, str) else place)]

    def explain(x: Tensor) -> Any:
        a, g = both(x)
        if averaged is not None:
            pairs = [(a, g)] if isinstance(place, str) else zip(a, g, strict=True)
            for watch, (one, slope) in zip(watches, pairs, strict=True):
                terms = averaged(one, slope)
                if terms is not None:
                    watch(x, terms)
        return rule(a, g) if isinstance(place, str) else tuple(map(rule, a, g))

    return named(explain, f"local({name_of(score)})")


def vanishing(
    name: str, score: Score, place: str, tolerance: float = 0.0
) -> Callable[[Tensor, Tensor], None]:
    r"""Return a watch over the weights of channels: it warns where all of them are rounding.

    Before a normalisation of each channel alone the score does not change if a channel is shifted, so
    :math:`\sum_u G_{d,u} = 0` for every channel d: what is computed of it are the rounding errors of a sum that
    cancels, and a map with these weights is noise that looks like a picture.

    Args:
        name: of the method.
        score: the score.
        place: where the channels are.
        tolerance: as in ``local``.

    Returns:
        ``(x, terms) -> None`` for terms (D, \*U) that are added up over the grid.
    """
    instead: list[tuple[str, ...]] = []

    def watch(x: Tensor, terms: Tensor) -> None:
        if not levels.true_anywhere(_cancels(terms.detach(), tolerance)):
            return
        if not instead:
            instead.append(_after_the_norm(score, place, x))
        such = f", such as {' or '.join(map(repr, instead[0]))}" if instead[0] else ""
        message = (
            f"{name}: the weights of all channels at {place!r} are rounding errors, and so is the map. What they "
            "add up cancels there, as it does before a norm of each channel alone (instance norm). "
            f"Take a place after the norm and its activation{such}; or hires_cam or layer_cam, which do not average."
        )
        if all(event["message"] != message for event in current().events):
            record("vanishing weights", message, place=place, instead=list(instead[0]))

    return watch


# Sums of more than this many roundings of their terms say something.
ROUNDINGS = 512


def _cancels(terms: Tensor, tolerance: float = 0.0) -> Tensor:
    """Whether the sums over the grid are rounding in every channel, and the terms are not zero."""
    axes = grid(terms)
    sizes = torch.linalg.vector_norm(terms, ord=1, dim=axes)  # without a copy, as abs() would make
    least = max(tolerance, ROUNDINGS * torch.finfo(terms.dtype).eps)
    small = terms.sum(axes).abs() <= least * sizes
    return small.all() & (sizes > 0).any()


def _after_the_norm(score: Score, place: str, x: Tensor) -> tuple[str, ...]:
    """The last place of the same shape before sums over the grid cancel again, or nothing if none is found."""

    def look() -> tuple[str, ...]:
        one = _probe(x)
        graph = Graph(score, one)
        at = next(i for i, p in enumerate(graph.passed) if place in (str(p.at), graph.label(p)))
        own = graph.passed[at]
        later = [
            graph.label(p)
            for p in graph.passed[at + 1 :]
            if graph.used(p) and not graph.first_name(p) and p.shape == own.shape
        ]
        found: tuple[str, ...] = ()
        for name in later[:8]:
            _, slope = activation_and_gradient(score, name)(one)
            if bool(_cancels(slope)):
                if found:
                    break
            else:
                found = (name,)
        return found

    with visits.aside():
        try:
            return native.outside(look)
        except Exception:  # it is advice: a score that cannot be looked at alone gets the general one
            return ()


def at_each(where: str, explaining: Callable[[str], Explain], place: Names) -> Explain:
    r"""Return the explanation of one place; of several places one for each, one after the other.

    For methods whose places have no pass in common.

    Args:
        where: the method, for errors.
        explaining: ``place -> Explain``.
        place: one place, or several.

    Returns:
        ``(x, *refs) -> map``, or a tuple of maps for several places.

    Example:
        >>> import torch
        >>> explaining = lambda place: lambda x: x * len(place)
        >>> [a.item() for a in at_each("demo", explaining, ["a", "bc"])(torch.ones(1))]
        [1.0, 2.0]
    """
    if isinstance(place, str):
        return explaining(place)
    _names(where, place)
    explanations = [explaining(p) for p in place]
    return lambda *given: tuple(explain(*given) for explain in explanations)  # type: ignore[return-value]


# --- How it is done ---------------------------------------------------------------------------------------


class _Origins:
    """The input that each living activation came from; copies in other processes begin with none."""

    def __init__(self) -> None:
        self.known: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Origins, ()


def _names(where: str, place: Names) -> tuple[list[views.Address], Callable[[Sequence[Tensor]], Any]]:
    if isinstance(place, str):
        return [views.parse(where, place)], lambda found: found[0]
    if not isinstance(place, Sequence) or not place:
        raise check.refused_type(
            where,
            "a place or a sequence of places",
            check.describe(place),
            "Pass for example 'encoder.0'",
        )
    names = [views.parse(where, p) for p in place]
    if len(set(names)) != len(names):
        raise check.refused(where, "each place once", ", ".join(map(str, names)), "Remove repetitions")
    return names, tuple


Sizes = Sequence[tuple[tuple[int, ...], torch.dtype]]


def pulled(
    where: str, score: Score, names: Sequence[views.Address], sizes: Sizes, x: Tensor, what: Any = "tap"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Return what is seen at places, the gradients there, and with biases the gradient for the input, in one pass."""
    seen = [Edit(name, what) for name in names]

    def nudged(*ds: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        edits = [Edit(name, "nudge", d) for name, d in zip(names, ds, strict=False)]
        y, found = interception.observe(where, score, ds[len(names) :] or (x,), [*edits, *seen])
        return y, tuple(found)

    zeros = [torch.zeros((), dtype=d, device=x.device).expand(s) for s, d in sizes]
    # What is data is what comes from the input, as seen by whoever differentiates for it.
    given = zeros if what == "tap" else [*zeros, x]
    _, gradients, found = value_gradients_and_more(nudged, name_of(score))(*given)
    own = gradients[len(names) :]
    return found, gradients[: len(names)], own[0] if own else None


# --- Places of a stitched answer: each tile is a score of its own, by the cotangent of the whole score there ------


def _alone(score: Callable[..., Any]) -> bool:
    """Whether its tiles can be looked at: its operations follow no rules, and nobody else is looking."""
    return visits.current() is None and not facts_of(score).rewritten


def of_tile(window: SlidingWindow, weight: Tensor, cotangent: Tensor, like: Callable[..., Any]) -> Score:
    """Return what a tile adds to the score, to first order: its answer, weighted as it is stitched and counts."""
    tile = lambda patch: (weight * cotangent * window.model(patch)).sum()
    return named(tile, name_of(like))


def tile_sizes(window: SlidingWindow, names: Sequence[views.Address], x: Tensor) -> Sizes:
    """Shape and dtype at every place of a tile; refused where they are no maps that can be stitched."""
    patch = patch_of("sliding_window", window.patch, x)
    own = cut(x, tuple(slice(n) for n in patch))
    sizes = _shapes(window.model, [at.in_full if at.numbered else str(at) for at in names])(own)
    for name, (shape, _) in zip(names, sizes, strict=True):
        if len(shape) != x.ndim:
            raise check.refused(
                "places",
                "a layer with feature maps (D,*U), where that of the whole image is stitched of those of patches",
                f"an activation of shape {shape} at {str(name)!r}",
                "Choose a layer before pooling or flattening",
            )
    return sizes


def _units(weight: Tensor, a: Tensor) -> Tensor:
    """What the units of a layer count for: the mean weight of the elements (1,*patch) that lie below."""
    pool: Callable[..., Tensor] = (adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d)[a.ndim - 2]
    return pool(weight, list(a.shape[1:])).to(a.dtype)


def _stitched(
    score: Score, names: Sequence[views.Address], x: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Activations and gradients of the whole image: means of the tiles' activations, sums of their gradients."""
    whole = frozen("places", score, x)
    sizes = tile_sizes(whole.window, names, whole.x)

    def one(weight: Tensor, patch: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        tile = of_tile(whole.window, weight, cotangent, score)
        found, gradients, _ = pulled("places", tile, names, sizes, patch)
        parts = [_units(weight, a) for a in found]
        return (*[a * part for a, part in zip(found, parts, strict=True)], *parts, *gradients)

    found = whole.window.gathered(vmap(one), whole.x, whole.cotangent)
    k = len(names)
    return tuple(map(torch.div, found[:k], found[k : 2 * k])), found[2 * k :]


def _stitched_taps(
    score: Callable[..., Any], names: Sequence[views.Address], x: Tensor
) -> tuple[Tensor, ...]:
    """Activations of the whole image: means of those of the tiles, weighted as answers are."""
    window, image = met(score, x)
    tile_sizes(window, names, image)
    taps = [Edit(name, "tap") for name in names]

    def one(weight: Tensor, patch: Tensor) -> tuple[Tensor, ...]:
        found = interception.observe("tap", window.model, (patch,), taps, stop=True)[1]
        parts = [_units(weight, a) for a in found]
        return (*[a * part for a, part in zip(found, parts, strict=True)], *parts)

    found = window.gathered(vmap(one), image)
    return tuple(map(torch.div, found[: len(names)], found[len(names) :]))


def _text(place: Names) -> str:
    return place if isinstance(place, str) else ", ".join(place)


def _with(kind: Any, score: Callable[..., Tensor], place: Names) -> Callable[..., Tensor]:
    check.runs(kind, score)
    names, _ = _names(kind, place)

    def changed(*inputs: Any) -> Tensor:
        if len(inputs) < 2:
            raise check.refused_type(
                kind, "the input and what to put in", f"{len(inputs)} arguments", "Pass (x, z)"
            )
        *own, put = inputs
        tensors = [put] if isinstance(place, str) else list(put)
        if len(tensors) != len(names):
            raise check.refused(
                kind, f"{len(names)} tensors, one for each place", str(len(tensors)), "Pass a tuple"
            )
        for name, t in zip(names, tensors, strict=True):
            check.floating(kind, f"what is put in at {str(name)!r}", t)
        edits = [Edit(name, kind, t) for name, t in zip(names, tensors, strict=True)]
        return interception.observe(kind, score, own, edits)[0]

    return named(changed, f"{name_of(score)} with {kind} at {_text(place)}")


def _passes(where: str, score: Callable[..., Any], names: Sequence[views.Address]) -> Callable[..., None]:
    """``(*inputs) -> None``, which tells that a place without a number is one of several calls.

    A tap stops at the first of them. What comes after it is counted once for inputs alike, by a dry run where the
    code allows one.
    """
    seen: dict[Any, views.View | None] = {}

    def run(*inputs: Any) -> views.View:
        with torch.no_grad():
            return interception.count_passes(where, score, inputs, names)

    def counted(inputs: Sequence[Any]) -> views.View | None:
        plain = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
        with visits.aside():
            try:
                if threading.current_thread() is threading.main_thread():
                    with contextlib.suppress(Exception):
                        return memory.without_values(lambda x: run(x, *plain[1:]), plain[0])
                return run(*plain)
            except DeadlineExceeded:
                raise
            except Exception:  # what fails behind the place is no matter of the place
                return None

    def say(*inputs: Any) -> None:
        if all(at.numbered for at in names):
            return
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in inputs if isinstance(t, Tensor))
        if key not in seen:
            seen[key] = counted(inputs)
        view = seen[key]
        if view is not None:
            view.say_which_calls()

    return say


def _shapes(score: Score, place: Names) -> Callable[[Tensor], list[tuple[tuple[int, ...], torch.dtype]]]:
    """``x -> `` shape and dtype of the activation at every place, found once for inputs alike."""
    found: dict[Any, list[tuple[tuple[int, ...], torch.dtype]]] = {}
    taps = [Edit(name, "tap") for name in _names("tap", place)[0]]

    def shapes(x: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
        key = (tuple(x.shape), x.dtype, x.device)
        if key not in found:
            found[key] = look(x)
        return found[key]

    def look(x: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
        # A dry run takes no time whatever the size; code that looks at values needs a real one, and so do
        # threads, since torch's dry run is not made for several of them.
        if threading.current_thread() is not threading.main_thread():
            return run(x.detach())
        try:
            return memory.without_values(run, x)
        except InTiles:
            raise
        except Exception:
            return run(x.detach())

    def run(x: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
        with torch.no_grad():
            _, seen = interception.observe("places", score, (x,), taps, stop=True)
        for tapped, z in zip(taps, seen, strict=True):
            if not z.is_floating_point() or z.ndim == 0:
                raise check.refused_type(
                    "places",
                    "a place with floating activations inside of the network",
                    f"{check.describe(z)} at {str(tapped.at)!r}",
                    "Choose a place before the reducer, argmax, comparison or cast",
                )
        return [(tuple(z.shape), z.dtype) for z in seen]

    return shapes


def refuse_unused(where: str, score: Score, at: views.Address, x: Tensor) -> None:
    """Raise where an explanation is zero because the score does not depend on the place at all."""
    score = getattr(score, "of", score)  # rules change no way, and what they follow cannot be listed
    with visits.aside():
        try:
            graph = native.outside(lambda: Graph(score, _probe(x)))
        except RuntimeError:  # a score that holds tensors of an enclosing transform cannot be looked at alone
            return
    passed = [p for p in graph.passed if p.at == at]
    if passed and not graph.used(passed[0]):
        raise check.refused(
            where,
            "a place that the score depends on",
            f"{str(at)!r}, from which no gradient leads to the score",
            "It lies behind what the score uses, or its result is thrown away",
        )


def _refuse_ways_around(
    score: Score,
    put: Callable[..., Tensor],
    trunk: Callable[[Tensor], Any],
    names: Sequence[views.Address],
    place: Names,
    like: Tensor,
) -> Tensor:
    """Raise unless the places are a cut; else an input of the right size for the rest to run on."""

    def look() -> tuple[Tensor, tuple[str, ...], bool]:
        one, other = _probe(like), -2 * _probe(like) + 1
        graph = Graph(score, one)
        beside = graph.beside([p for p in graph.passed if p.at in names])
        with torch.no_grad():
            there = put(other, trunk(one))
            here = score(one)
            close = levels.fake(here) or torch.allclose(there, here, rtol=1e-4, atol=0, equal_nan=True)
            return one, beside, close

    with visits.aside():
        try:
            one, beside, same = native.outside(look)
        except Exception as error:
            raise check.refused(
                "split",
                "a score that can be checked to be cut there",
                f"{_text(place)!r} and an error on a probe ({str(error).splitlines()[0][:120]})",
                "Freeze the rest with split(score, place, at=x)",
            ) from error
    if beside or not same:
        way = f"more flows beside it, through {', '.join(beside)}" if beside else "more flows beside it"
        advice = "Freeze the rest with split(score, place, at=x)"
        if beside and "input" not in beside:
            everything = [*map(str, names), *beside]
            advice += f", or cut at all of {everything}"
        raise check.refused(
            "split", "a cut, where the head gets all it needs", f"{_text(place)!r}: {way}", advice
        )
    return one


def _probe(like: Tensor) -> Tensor:
    base = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return check.wave(base)


def all_places(score: Callable[[Tensor], Tensor], x: Tensor, *, grids: bool = False) -> tuple[str, ...]:
    """Return the names of all places that the score depends on; each tensor once.

    Args:
        score: a score or a model.
        x: an example.
        grids: only those that are feature maps ``(D, *U)`` with as many axes as the input.

    Returns:
        Names in order, to be handed to what takes several places.

    Example:
        >>> import torch, esegeta as eg
        >>> score = lambda x: (eg.mark(2 * x, "double") ** 2).sum()
        >>> all_places(score, torch.ones(1, 2))
        ('mul', 'pow')
    """
    return tuple(_once(places(score, x), x if grids else None))


def _once(found: Places, like: Tensor | None) -> Iterator[str]:
    for place in found:
        if place.used and not place.same_as and (like is None or len(place.shape) == like.ndim):
            yield place.name
