"""Named places: the listing against brute force, every edit against plain hooks and hand-written heads."""

import contextlib
import functools
import gc
import re
import threading
import time
import warnings
import weakref
from collections import Counter, namedtuple
from dataclasses import dataclass

import jaxtyping
import pytest
import rounding
import torch
from refusing import refused
from rounding import alike, assert_alike
from together import together
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import esegeta as eg
from esegeta import zoo
from esegeta._facts import facts_of
from esegeta.engine import visits
from esegeta.models import parametrised

close = functools.partial(rounding.close, tolerance=1e-05)

F = nn.functional


class Net(nn.Module):
    """A network of a function of (module, batch), with named children, in evaluation mode."""

    def __init__(self, fn, **children):
        super().__init__()
        self.fn = fn
        for name, child in children.items():
            setattr(self, name, child)
        self.eval()

    def forward(self, *inputs, **named):
        return self.fn(self, *inputs, **named)


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


def square(model):
    return lambda x: model(x).square().sum()


def score_of(net, output=None):
    return square(eg.from_module(net, output))


def marks(net):
    """All that an edit might leave behind on a network."""
    found = []
    for path, m in net.named_modules():
        hooks = [(k, len(v)) for k, v in vars(m).items() if "hook" in k and v]
        found.append((path, m.training, hooks, sorted(set(vars(m)))))
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    state = {n: (id(t), t.requires_grad, t.grad, t.detach().clone()) for n, t in tensors.items()}
    return found, state


@contextlib.contextmanager
def untouched(net):
    """What runs in this block leaves the network and the thread as they were."""
    found, state = marks(net)
    yield
    after, now = marks(net)
    assert after == found
    assert list(now) == list(state)
    for name, (where, needs, g, value) in state.items():
        assert now[name][:3] == (where, needs, g), name
        assert torch.equal(now[name][3], value), name
    assert visits.current() is None


def by_hooks(net, x):
    """Every output of every module, with its gradient, by ordinary hooks and autograd: name -> (A, G)."""
    kept, calls, handles = {}, Counter(), []

    def keep(path):
        def hook(_m, _args, output):
            call = calls[path]
            calls[path] += 1
            leaves = []

            def cut_off(t):
                if isinstance(t, torch.Tensor) and t.requires_grad:
                    t.retain_grad()
                    leaves.append(t)
                    return t.clone()  # so that nobody writes into what is kept
                return t

            out = tree_map(cut_off, output)
            name = path + (f"#{call}" if call else "")
            if isinstance(output, torch.Tensor):
                kept[name] = (leaves[0].detach().clone(), leaves[0])
            return out

        return hook

    seen = set()
    for path, m in net.named_modules():
        if path and m not in seen:
            seen.add(m)
            handles.append(m.register_forward_hook(keep(path)))
    try:
        net(x[None].clone()).square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for p in net.parameters():
            p.grad = None
    return {name: (a[0], None if t.grad is None else t.grad[0]) for name, (a, t) in kept.items()}


# ------------------------------------------------------------------ small architectures, listed by hand


def residual(s, x):
    h = s.stem(x)
    return s.out(torch.relu(h + s.second(F.relu(s.first(h)))))


def dense(s, x):
    h1 = s.a(x).relu()
    h2 = s.b(torch.cat([x, h1], 1)).relu_()
    return s.c(torch.cat([x, h1, h2], 1))


def unet_level(s, x):
    skip = s.enc(x).tanh()
    deep = s.up(s.bottom(F.avg_pool2d(skip, 2)))
    return s.out(torch.cat([deep, skip], dim=1))


def squeeze(s, x):
    h = s.a(x)
    weights = s.fc(h.mean((2, 3))).sigmoid()
    return s.out(h * weights[:, :, None, None])


def supervised(s, x):
    h = s.a(x).tanh()
    return {"main": s.main(h), "deep": [s.deep(h)]}


def in_place(s, x):
    h = F.relu(s.a(x), inplace=True)
    g = torch.relu_(s.b(h))
    g = s.c(g)
    g += h
    return s.act(s.out(g))


ARCHITECTURES = {
    "chain": (
        lambda: nn.Sequential(conv(1, 2), nn.Sequential(nn.Tanh(), conv(2, 2)), nn.Identity(), nn.Dropout()),
        {"0": (), "1.0": (), "1.1": (), "1": (), "2": (), "3": ()},
    ),
    "residual": (
        lambda: Net(residual, stem=conv(1, 3), first=conv(3, 3), second=conv(3, 3), out=conv(3, 1)),
        {
            "stem": (),
            "first": ("stem",),
            "relu#0": ("stem",),
            "second": ("stem",),
            "add": (),
            "relu#1": (),
            "out": (),
        },
    ),
    "u-net": (
        lambda: Net(
            unet_level, enc=conv(1, 2), bottom=conv(2, 3), up=nn.ConvTranspose2d(3, 2, 2, 2), out=conv(4, 1)
        ),
        {
            "enc": (),
            "tanh": (),
            "avg_pool2d": ("tanh",),
            "bottom": ("tanh",),
            "up": ("tanh",),
            "cat": (),
            "out": (),
        },
    ),
    "dense": (
        lambda: Net(dense, a=conv(1, 2), b=conv(3, 2), c=conv(5, 2)),
        {
            "a": ("input",),
            "relu#0": ("input",),
            "cat#0": ("input", "relu#0"),
            "b": ("input", "relu#0"),
            "relu#1": ("input", "relu#0"),
            "cat#1": (),
            "c": (),
        },
    ),
    "global residual": (
        lambda: Net(lambda s, x: x + s.b(torch.tanh(s.a(x))), a=conv(1, 2), b=conv(2, 1)),
        {"a": ("input",), "tanh": ("input",), "b": ("input",), "add": ()},
    ),
    "gate": (
        lambda: Net(lambda s, x: s.gate(x).sigmoid() * s.a(x), a=conv(1, 2), gate=conv(1, 2)),
        {"gate": ("input",), "sigmoid": ("input",), "a": ("sigmoid",), "mul": ()},
    ),
    "squeeze": (
        lambda: Net(squeeze, a=conv(1, 2), fc=nn.Linear(2, 2), out=conv(2, 1)),
        {
            "a": (),
            "mean": ("a",),
            "fc": ("a",),
            "sigmoid": ("a",),
            "getitem": ("a",),
            "mul": (),
            "out": (),
        },
    ),
    "reused": (
        lambda: Net(
            lambda s, x: s.out(s.b(s.b(s.b(x)))), b=nn.Sequential(conv(1, 1), nn.Tanh()), out=conv(1, 1)
        ),
        {f"{part}{call}": () for call in ("#0", "#1", "#2") for part in ("b.0", "b.1", "b")} | {"out": ()},
    ),
    "in place": (
        lambda: Net(
            in_place, a=conv(1, 3), b=conv(3, 3), c=conv(3, 3), out=conv(3, 2), act=nn.ReLU(inplace=True)
        ),
        {
            "a": (),
            "relu#0": (),
            "b": ("relu#0",),
            "relu#1": ("relu#0",),
            "c": ("relu#0",),
            "add": (),
            "out": (),
            "act": (),
        },
    ),
    "in place modules": (
        lambda: nn.Sequential(conv(1, 3), nn.ReLU(inplace=True), conv(3, 2), nn.SiLU(inplace=True)),
        {"0": (), "1": (), "2": (), "3": ()},
    ),
}


def tensors(found, names):
    """Names of tensors by the first that each has: a block hands on what its last layer made."""
    return tuple(n if n == "input" else found[n].same_as or n for n in names)


every_architecture = pytest.mark.parametrize("which", ARCHITECTURES)
X = (1, 6, 6)


def built(which, dtype=torch.float32):
    torch.manual_seed(len(which))
    return ARCHITECTURES[which][0]().to(dtype).eval()


@every_architecture
def test_the_listing_is_what_one_writes_by_hand(which):
    net = built(which)
    with untouched(net):
        found = eg.places(score_of(net), torch.randn(X))
    assert {p.name: tensors(found, p.beside) for p in found} == ARCHITECTURES[which][1]
    assert found.names == tuple(ARCHITECTURES[which][1])  # in the order in which they are passed
    assert all(p.used and p.cut == (not p.beside) for p in found)


@every_architecture
def test_cuts_and_what_lies_beside_are_those_of_brute_force(which):
    """A place that holds still, while the input changes: does the score?"""
    net = built(which, torch.float64)
    score, x = score_of(net), torch.randn(X).double()

    def determines(names):
        put = eg.replace(score, names)
        values = eg.tap(score, names)(x)
        others = [torch.randn(X).double() for _ in range(3)]
        return all(torch.allclose(put(other, values), score(x), rtol=1e-9) for other in others)

    for p in eg.places(score, x):
        assert determines(p.name) == p.cut, p
        if p.beside and "input" not in p.beside:
            assert determines([p.name, *p.beside]), p
            if len(p.beside) > 1:  # and none of them is there for nothing
                assert not any(determines([p.name, *(b for b in p.beside if b != left)]) for left in p.beside)


@every_architecture
def test_activations_and_gradients_are_those_of_plain_hooks(which):
    net = built(which)
    score, x = score_of(net), torch.randn(X)
    expected = by_hooks(net, x)
    with untouched(net):
        found = [p for p in eg.places(score, x) if p.kind == "module"]
        assert [p.name.removesuffix("#0") for p in found] == list(expected)
        for p in found:
            a, g = eg.activation_and_gradient(score, p.name)(x)
            assert p.shape == a.shape == g.shape == eg.tap(score, p.name)(x).shape
            assert_alike(a, eg.tap(score, p.name)(x))
            assert p.dtype == a.dtype
            close((a, g), expected[p.name.removesuffix("#0")])
        many = eg.activation_and_gradient(score, [p.name for p in found])(x)
        for p, a, g in zip(found, *many, strict=True):
            close((a, g), expected[p.name.removesuffix("#0")])
    assert any(g.abs().max() > 0 for _, g in expected.values())


def exact_everywhere(net, score, x, moved=True):
    """head(trunk(x)), a replacement by itself and a nudge by nothing are the score, up to rounding."""
    whole = score(x)
    found = eg.places(score, x)
    assert found
    for p in found:
        trunk, head = eg.split(score, p.name)
        z = trunk(x)
        assert z.shape == p.shape
        assert_alike(head(z), whole)
        assert_alike(eg.replace(score, p.name)(x, z), whole)
        assert_alike(eg.nudge(score, p.name)(x, torch.zeros_like(z)), whole)
        if moved and p.used and p.cut:
            assert not alike(head(1.5 * z + 1), whole), p
            close(head(1.5 * z + 1), eg.replace(score, p.name)(torch.randn_like(x), 1.5 * z + 1))
    return found


@every_architecture
def test_a_split_is_exact_at_every_place(which):
    net = built(which)
    with untouched(net):
        exact_everywhere(net, score_of(net), torch.randn(X))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_split_is_exact_at_every_place_of_the_small_unet(ndim):
    net = zoo.small_unet(ndim)
    score, x = eg.reducers.class_sum(eg.from_module(net), 1), torch.randn((1,) + (8,) * ndim)
    with untouched(net):
        found = exact_everywhere(net, score, x, moved=ndim == 3)
    beside = {p.name: tensors(found, p.beside) for p in found if p.beside}
    assert beside == dict.fromkeys(
        ("pool", "bottom.conv", "bottom.norm", "bottom.relu", "bottom", "up"), ("encoder.relu",)
    )
    assert found["cat"].cut
    assert found["decoder.conv"].shape == (4,) + (8,) * ndim


@pytest.mark.parametrize("split", [pytest.param((16, 16, 16), marks=pytest.mark.slow), (24, 32, 16)])
def test_a_split_is_exact_at_every_place_of_the_brain_network(split):
    net = zoo.brain_extraction_unet()
    score, x = eg.reducers.class_mean(eg.from_module(net), 1), torch.rand(1, *split)
    with untouched(net):
        found = eg.places(score, x)
        whole = score(x)
        names = [p.name for p in found]
        for p in found if split == (16, 16, 16) else list(found)[::9]:
            trunk, head = eg.split(score, p.name)
            assert_alike(head(trunk(x)), whole)
        activations, gradients = eg.activation_and_gradient(score, names)(x)
    assert [a.shape for a in activations] == [p.shape for p in found]
    modules = [p for p in found if p.kind == "module" and p.call == 0 and ":" not in p.name]
    assert {p.name for p in modules} == {
        path for path, m in net.named_modules() if path and not isinstance(m, nn.ModuleList)
    } - {"encoder.0", "encoder.1", "encoder.2"}
    # The levels of the skips, and what crosses over beside each depth.
    skips = ("encoder.0.relu_b", "encoder.1.relu_b", "encoder.2.relu_b")
    beside = {p.name: tensors(found, p.beside) for p in found}
    assert found["encoder.0.relu_b"].cut
    assert beside["encoder.1.conv_a"] == skips[:1]
    assert beside["encoder.2.conv_b"] == skips[:2]
    assert beside["encoder.2.pool"] == beside["decoder.0.up"] == skips
    assert beside["decoder.0.conv"] == skips[:2]
    assert beside["decoder.1.relu"] == skips[:1]
    assert beside["encoder.1:1"] == ("encoder.0.relu_b", "encoder.1.pool")
    assert found["decoder.2.cat"].cut
    assert found["out"].cut
    # Against autograd, at the level of the bottleneck, with the network written out by hand.
    with torch.no_grad():
        x0, skip0 = net.encoder[0](x[None])
        x1, skip1 = net.encoder[1](x0)
        skip2 = net.encoder[2].relu_b(net.encoder[2].conv_b(net.encoder[2].relu_a(net.encoder[2].conv_a(x1))))
    a = skip2.clone().requires_grad_()
    y = net.decoder[2](net.decoder[1](net.decoder[0](net.encoder[2].pool(a), a), skip1), skip0)
    (expected,) = torch.autograd.grad(net.out(y).mean(), a)
    i = names.index("encoder.2.relu_b")
    close(activations[i], skip2[0])
    close(gradients[i], expected[0], tolerance=1e-6)


@pytest.mark.parametrize("which", ["residual", "u-net", "dense", "reused", "in place"])
def test_everything_maps_over_examples(which):
    net = built(which)
    score, xs = score_of(net), torch.randn(2, *X)
    names = eg.all_places(score, xs[0])
    a, g = vmap(eg.activation_and_gradient(score, names))(xs)
    taps = vmap(eg.tap(score, names))(xs)
    for i, x in enumerate(xs):
        a1, g1 = eg.activation_and_gradient(score, names)(x)
        for j in range(len(names)):
            close(a[j][i], a1[j])
            close(g[j][i], g1[j])
            close(taps[j][i], a1[j])
    for j, name in enumerate(names):
        zs = taps[j]
        close(vmap(eg.replace(score, name))(xs, zs), vmap(score)(xs))
        # one input with many activations, one activation with many inputs
        put = eg.replace(score, name)
        close(vmap(put, (None, 0))(xs[0], zs), torch.stack([put(xs[0], z) for z in zs]), tolerance=1e-4)
        close(vmap(put, (0, None))(xs, zs[0]), torch.stack([put(x, zs[0]) for x in xs]), tolerance=1e-4)
        if j == 0:
            nested = vmap(lambda x: vmap(lambda z: put(x, z))(zs))(xs)
            close(nested, torch.stack([vmap(put, (None, 0))(x, zs) for x in xs]), tolerance=1e-4)
        trunk, head = eg.split(score, name)
        close(vmap(lambda x: head(trunk(x)))(xs), vmap(score)(xs))


# ------------------------------------------------------------------ derivatives, against heads written by hand


def smooth():
    torch.manual_seed(5)
    net = Net(lambda s, x: s.out(s.a(x).tanh().pow(3)), a=nn.Linear(2, 3), out=nn.Linear(3, 2)).double()

    def trunk(x):
        return net.a(x)

    def head(z):
        return net.out(z.tanh().pow(3)).square().sum()

    for p in net.parameters():
        p.requires_grad_(False)
    return net, trunk, head, torch.tensor([0.3, 0.8], dtype=torch.float64)


def pullback(f):
    return lambda x: vjp(f, x)[1](torch.ones_like(f(x)))[0]


ORDERS = {
    "value": lambda f: f,
    "grad": lambda f: grad(lambda z: f(z).sum()),
    "vjp": pullback,
    "jvp": lambda f: lambda z: jvp(f, (z,), (z.cos(),))[1],
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "hessian": hessian,
    "jvp of grad": lambda f: lambda z: jvp(grad(lambda y: f(y).sum()), (z,), (z.cos(),))[1],
    "grad of grad": lambda f: grad(lambda z: grad(lambda y: f(y).sum())(z).square().sum()),
    "vmap of grad": lambda f: lambda z: vmap(grad(lambda y: f(y).sum()))(torch.stack([z, 2 * z])),
    "vmap of hessian": lambda f: lambda z: vmap(hessian(f))(torch.stack([z, 2 * z])),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "autograd": lambda f: lambda z: torch.autograd.functional.jacobian(lambda y: f(y).sum(), z),
    "autograd twice": lambda f: lambda z: torch.autograd.functional.hessian(lambda y: f(y).sum(), z),
}
d0 = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)


@functools.cache
def functions():
    """Pairs of what the library makes and the same written out, as functions of one vector."""
    net, trunk, head, x = smooth()
    model = eg.from_module(net)
    score = square(model)
    z = trunk(x)
    cut = eg.split(score, "a")
    cut[0](x)
    return {
        "tap": (eg.tap(score, "a"), trunk, x),
        "tap of an operation": (eg.tap(score, "pow"), lambda x: trunk(x).tanh().pow(3), x),
        "replace": (lambda v: eg.replace(score, "a")(x, v), head, z),
        "replace in the model": (
            lambda v: eg.replace(model, "a")(x, v),
            lambda v: net.out(v.tanh().pow(3)),
            z,
        ),
        "nudge": (lambda d: eg.nudge(score, "a")(x, d), lambda d: head(z + d), d0),
        "nudge of the input": (lambda v: eg.nudge(score, "a")(v, d0), lambda v: head(trunk(v) + d0), x),
        "both": (lambda v: eg.nudge(score, "a")(v, v.sum()[None]), lambda v: head(trunk(v) + v.sum()), x),
        "head": (cut[1], head, z),
        "head at": (eg.split(score, "a", at=x)[1], head, z),
        "all of it": (lambda v: cut[1](2 * cut[0](v)), lambda v: head(2 * trunk(v)), x),
        "activation times gradient": (
            lambda v: (lambda a, g: (a * g).sum()[None])(*eg.activation_and_gradient(score, "a")(v)),
            lambda v: (trunk(v) * grad(head)(trunk(v))).sum()[None],
            x,
        ),
        "at": (eg.at(eg.gradient, "a")(score), lambda v: grad(head)(trunk(v)), x),
    }


@together("order", ORDERS)
@together("which", functions())
def test_derivatives_of_every_order(which, order):
    ours, plain, at = functions()[which]
    expected = ORDERS[order](plain)(at)
    straight = which == "tap" and order in {
        "hessian",
        "jvp of grad",
        "grad of grad",
        "vmap of hessian",
        "jacrev of jacrev",
        "autograd twice",
    }
    assert (expected.abs().max() == 0) == straight  # a linear trunk has no second derivative
    close(ORDERS[order](ours)(at), expected, tolerance=1e-9)


def test_ordinary_autograd_on_the_input_and_on_what_is_put_in():
    net, trunk, head, x = smooth()
    score = score_of(net)
    v, d = x.clone().requires_grad_(), d0.clone().requires_grad_()
    got = torch.autograd.grad(eg.nudge(score, "a")(v, d), (v, d))
    want = torch.autograd.grad(head(trunk(v) + d), (v, d))
    close(got, want, tolerance=1e-9)


# ------------------------------------------------------------------ in place


class Overwrites(nn.Module):
    """The convolution's tensor is overwritten by the ReLU, in one of five spellings, and read again."""

    def __init__(self, spelling):
        super().__init__()
        self.a, self.b = conv(1, 3), conv(3, 3)
        self.act = nn.ReLU(inplace=True)
        self.spelling = spelling

    def forward(self, x):
        h = self.a(x)
        r = self.spelling(self, h)
        return self.b(r) + h  # h is r: overwritten


SPELLINGS = {
    "module": lambda s, h: s.act(h),
    "F.relu": lambda s, h: F.relu(h, inplace=True),
    "torch.relu_": lambda s, h: torch.relu_(h),
    "h.relu_": lambda s, h: h.relu_(),
    "F.relu_": lambda s, h: F.relu_(h),
    "clamp_": lambda s, h: h.clamp_(min=0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_tap_before_an_operation_in_place_sees_the_value_before(spelling):
    net = Overwrites(SPELLINGS[spelling]).eval()
    score, x, xs = score_of(net), torch.randn(X), torch.randn(3, *X)
    plain = net.a(x[None])[0].detach()
    assert plain.min() < 0
    for _ in range(2):  # the second time it is known that a copy is needed
        close(eg.tap(score, "a")(x), plain)
        close(vmap(eg.tap(score, "a"))(xs), net.a(xs).detach())

    def rest(z):
        r = z[None].relu()
        return (net.b(r) + r).square().sum()

    a, g = eg.activation_and_gradient(score, "a")(x)
    close(a, plain)
    close(g, grad(rest)(plain).detach(), tolerance=1e-4)
    close(eg.replace(score, "a")(x, 2 * plain), rest(2 * plain).detach(), tolerance=1e-4)
    close(eg.nudge(score, "a")(x, plain), rest(2 * plain).detach(), tolerance=1e-4)
    z = plain.clone()
    eg.replace(score, "a")(x, z)
    assert torch.equal(z, plain)  # the network writes into a copy


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_change_at_an_operation_in_place_reaches_all_its_readers_or_is_refused(spelling):
    net = Overwrites(SPELLINGS[spelling]).eval()
    score, x = score_of(net), torch.randn(X)
    (place,) = [n for n in eg.all_places(score, x) if n in ("act", "relu", "clamp")]
    r = net.a(x[None]).relu()[0].detach()
    rest = lambda r: (net.b(r[None]) + r[None]).square().sum()
    close(eg.tap(score, place)(x), r)
    try:
        got = eg.replace(score, place)(x, 2 * r), eg.nudge(score, place)(x, r)
        g = eg.activation_and_gradient(score, place)(x)[1]
    except ValueError as error:
        assert re.match(r"(?s)^\w+: expected .*, got .*in.place.*\. .*\.$", str(error))  # noqa: PT017
        return
    close(got, (rest(2 * r).detach(), rest(2 * r).detach()), tolerance=1e-4)
    close(g, grad(rest)(r).detach(), tolerance=1e-4)


def test_a_statement_in_place_is_a_place_that_can_be_changed_or_is_refused():
    def forward(s, x):
        h = s.a(x)
        h.relu_()
        return s.out(h)

    net = Net(forward, a=conv(1, 3), out=conv(3, 1))
    score, x = score_of(net), torch.randn(X)
    rest = lambda r: net.out(r[None]).square().sum()
    r = net.a(x[None]).relu()[0].detach()
    try:
        got, g = eg.replace(score, "relu")(x, 2 * r), eg.activation_and_gradient(score, "relu")(x)[1]
    except ValueError as error:
        assert re.match(r"(?s)^\w+: expected .*, got .*in.place.*\. .*\.$", str(error))  # noqa: PT017
        return
    close(got, rest(2 * r).detach())
    close(g, grad(rest)(r).detach())


def test_what_was_tapped_is_not_written_to_later():
    net = built("in place modules")
    score, x = score_of(net), torch.randn(X)
    z = eg.tap(score, "0")(x)
    kept = z.clone()
    trunk, head = eg.split(score, "0")
    y = trunk(x)
    head(y), score(x), eg.replace(score, "0")(x, z)
    assert torch.equal(z, kept)
    assert torch.equal(y, kept)


# ------------------------------------------------------------------ which tensor: leaves, inputs, calls

Pair = namedtuple("Pair", "main aux")


@dataclass
class Plain:
    main: torch.Tensor
    aux: torch.Tensor


class Block(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.join = conv(1, 2), conv(1, 2), join

    def forward(self, x):
        return self.join(self.a(x), self.b(x))


NESTED = {
    "tuple": (lambda p, q: (p, (q, None, 3)), lambda o: (o[0], o[1][0]), ("block:0", "block:1.0")),
    "dict": (
        lambda p, q: {"p": p, "q": {"r": q}},
        lambda o: (o["p"], o["q"]["r"]),
        ("block:p", "block:q.r"),
    ),
    "list": (lambda p, q: [[p], q], lambda o: (o[0][0], o[1]), ("block:0.0", "block:1")),
    "namedtuple": (lambda p, q: Pair(p, q), lambda o: (o.main, o.aux), ("block:main", "block:aux")),
    "mixed": (
        lambda p, q: ({"a.b": p}, Pair(3, [q])),
        lambda o: (o[0]["a.b"], o[1].aux[0]),
        ("block:0.a.b", "block:1.aux.0"),
    ),
}


@pytest.mark.parametrize("form", NESTED)
def test_leaves_of_nested_results(form):
    join, take, names = NESTED[form]
    net = Net(
        lambda s, x: s.out((lambda p, q: p * q.sigmoid())(*take(s.block(x)))),
        block=Block(join),
        out=conv(2, 1),
    )
    score, x = score_of(net), torch.randn(X)
    with untouched(net):
        found = exact_everywhere(net, score, x)
        assert set(names) <= set(found.names)
        assert "block" not in found.names
        close(eg.tap(score, names)(x), (net.block.a(x[None])[0].detach(), net.block.b(x[None])[0].detach()))
        for put, name in zip((0, 1), names, strict=True):
            z = torch.randn(2, 6, 6)
            p, q = net.block.a(x[None]), net.block.b(x[None])
            p, q = (z[None], q) if put == 0 else (p, z[None])
            close(eg.replace(score, name)(x, z), net.out(p * q.sigmoid()).square().sum().detach())
    assert tensors(found, found[names[0]].beside) == ("block.b",)
    for wrong in ("block", "block:2", "block:nope", "block:0.0.0"):
        with refused(ValueError, "tap", "one tensor of 'block'", f"'{wrong}'.*2", f"such as '{names[0]}'"):
            eg.tap(score, wrong)(x)


def test_a_dataclass_that_torch_does_not_know_is_not_a_place_but_its_parts_are():
    net = Net(lambda s, x: (lambda o: s.out(o.main * o.aux))(s.block(x)), block=Block(Plain), out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    assert exact_everywhere(net, score, x).names == ("block.a", "block.b", "mul", "out")
    with refused(ValueError, "tap", "one tensor of 'block'", "'block'"):
        eg.tap(score, "block")(x)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(1, 2)

    def forward(self, x, *, scale=1.0, skip=None):
        return self.a(x) * scale + (0 if skip is None else skip)


def test_inputs_of_modules_also_by_keyword():
    net = Net(lambda s, x: s.out(s.k(x, scale=2.0, skip=s.p(x))), k=Keywords(), p=conv(1, 2), out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    with untouched(net):
        exact_everywhere(net, score, x)
        assert torch.equal(eg.tap(score, "k:in.0")(x), x)
        assert torch.equal(eg.tap(score, "k.a:in")(x), x)
        close(eg.tap(score, "k:in.skip")(x), net.p(x[None])[0].detach())
        assert_alike(eg.tap(score, "out:in")(x), eg.tap(score, "k")(x))
        assert_alike(eg.tap(score, "out:in.0")(x), eg.tap(score, "k")(x))
        z = torch.randn(2, 6, 6)
        expected = net.out(net.k(x[None], scale=2.0, skip=z[None])).square().sum().detach()
        close(eg.replace(score, "k:in.skip")(x, z), expected)
        # the input of a module is not its producer: others that read the producer do not see the change
        expected = net.out(net.k(2 * x[None], scale=2.0, skip=net.p(x[None]))).square().sum().detach()
        close(eg.replace(score, "k:in.0")(x, 2 * x), expected)
        close(eg.nudge(score, "k:in.0")(x, x), expected)
    for wrong in ("k:in", "k:in.1", "k:in.scale"):
        with refused(ValueError, "tap", "one tensor of 'k'", f"'{wrong}'.*in.0, in.skip", "such as 'k:in.0'"):
            eg.tap(score, wrong)(x)
    named = Net(lambda s, x: s.out(s.k(x=x)), k=Keywords(), out=conv(2, 1))
    score = score_of(named)
    assert torch.equal(eg.tap(score, "k:in")(x), x)
    close(eg.replace(score, "k:in")(x, 3 * x), score(3 * x), tolerance=1e-4)


def test_inputs_and_outputs_of_later_calls():
    net = built("reused")
    score, x = score_of(net), torch.randn(X)
    assert torch.equal(eg.tap(score, "b#0:in")(x), x)
    first, second = net.b(x[None]).detach(), net.b(net.b(x[None])).detach()
    close(eg.tap(score, ["b", "b#1"])(x), (first[0], second[0]))
    # the grammar puts the call before the leaf
    close(eg.tap(score, "b#2:in")(x), second[0])
    close(eg.replace(score, "b#1:in")(x, x), score_without_first(net, x))
    with pytest.warns(eg.ExecutionWarning, match="tap: 'b' is passed 3 times, and this is the first of them"):
        assert_alike(eg.tap(score, "b#0")(x), eg.tap(score, "b")(x))


def score_without_first(net, x):
    return net.out(net.b(net.b(x[None]))).square().sum().detach()


def test_a_module_under_two_names_goes_by_the_first():
    shared = conv(1, 1)
    net = Net(lambda s, x: s.out(s.second(s.first(x).tanh())), first=shared, second=shared, out=conv(1, 1))
    score, x = score_of(net), torch.randn(X)
    found = exact_everywhere(net, score, x)
    assert found.names == ("first#0", "tanh", "first#1", "out")
    assert [p.call for p in found] == [0, 0, 1, 0]
    close(eg.tap(score, "first#1")(x), shared(shared(x[None]).tanh())[0].detach())
    for wrong in ("second", "second:in", "second#1"):
        with refused(
            ValueError, "tap", "first of its names", f"'{wrong}'.*same module as 'first'", "first#1"
        ):
            eg.tap(score, wrong)(x)


def test_containers_and_layers_that_do_nothing():
    net = Net(
        lambda s, x: s.parts["end"](s.parts["list"][1](s.parts["list"][0](x)).exp()),
        parts=nn.ModuleDict(
            {
                "list": nn.ModuleList([conv(1, 2), nn.Sequential(nn.Identity(), nn.Dropout(0.9))]),
                "end": conv(2, 1),
            }
        ),
    )
    score, x = score_of(net), torch.randn(X)
    with untouched(net):
        found = exact_everywhere(net, score, x)
    assert found.names == (
        *("parts.list.0", "parts.list.1.0", "parts.list.1.1", "parts.list.1", "exp", "parts.end"),
    )
    with refused(ValueError, "tap", "a place that this input reaches", "'parts.list'.*never called"):
        eg.tap(score, "parts.list")(x)


def test_deep_supervision():
    net = Net(supervised, a=conv(1, 2), main=conv(2, 1), deep=conv(2, 1))
    x = torch.randn(X)
    main, deep = score_of(net, "main"), score_of(net, ("deep", 0))
    found = eg.places(main, x)
    assert {p.name: (p.used, p.cut) for p in found} == {
        "a": (True, True),
        "tanh": (True, True),
        "main": (True, True),
        "deep": (False, False),
    }
    assert eg.all_places(main, x) == ("a", "tanh", "main")
    assert "not used" in str(found)
    close(eg.tap(main, "deep")(x), net.deep(net.a(x[None]).tanh())[0].detach())
    assert_alike(eg.replace(main, "deep")(x, torch.zeros(1, 6, 6)), main(x))
    assert torch.equal(eg.replace(deep, "deep")(x, torch.ones(1, 6, 6)), torch.tensor(36.0))
    for place in ("deep", ["a", "deep"]):
        with refused(ValueError, r"\w+", "a place that the score depends on", "'deep'"):
            eg.activation_and_gradient(main, place)(x)


# ------------------------------------------------------------------ operations and markers


def test_operations_whatever_their_spelling():
    def forward(s, x):
        a = F.relu(s.a(x))  # relu
        b = torch.relu(s.a(a))  # relu#1
        c = s.a(b).relu()  # relu#2
        d = s.a(c).relu_()  # relu#3
        e = a + b  # add
        e = torch.add(e, c)  # add#1
        e += d  # add#2
        f = 1 - e / 2  # div, sub
        return f @ f

    net = Net(forward, a=conv(1, 1))
    score, x = score_of(net), torch.randn(X)
    found = exact_everywhere(net, score, x)
    assert [n for n in found.names if not n.startswith("a")] == [
        *("relu#0", "relu#1", "relu#2", "relu#3", "div", "sub", "matmul"),
    ]
    assert [n for n in found.names if n.startswith("add")] == ["add#0", "add#1", "add#2"]
    with torch.no_grad():
        a = net.a(x[None]).relu()
        b = net.a(a).relu()
        c = net.a(b).relu()
        d = net.a(c).relu()
    close(eg.tap(score, ["relu", "relu#1", "relu#2", "relu#3"])(x), (a[0], b[0], c[0], d[0]))
    close(eg.tap(score, ["add", "add#1", "add#2"])(x), ((a + b)[0], (a + b + c)[0], (a + b + c + d)[0]))


def test_operations_inside_of_blocks_belong_to_the_block():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(1, 1)

        def forward(self, x):
            return self.a(x).tanh() + x

    net = nn.Sequential(Inner(), Inner(), nn.Sequential(Inner())).eval()
    score, x = score_of(net), torch.randn(X)
    found = exact_everywhere(net, score, x)
    assert [p.name for p in found if p.kind == "operation"] == [
        *("0.tanh", "0.add", "1.tanh", "1.add", "2.0.tanh", "2.0.add"),
    ]
    assert tensors(found, found["1.tanh"].beside) == ("0.add",)
    close(eg.tap(score, "1.tanh")(x), net[1].a(net[0](x[None])).tanh()[0].detach())


def test_reshapes_are_counted_as_in_the_network_only():
    """The library brings batches into another layout; that is none of the network's operations."""

    def forward(s, x):
        h = s.a(x.reshape(x.shape[0], 1, 6, 6))
        h = h.reshape(-1, 2, 36).movedim(1, 2)
        return s.out(s.lin(h).movedim(2, 1).reshape(-1, 2, 6, 6))

    net = Net(forward, a=conv(1, 2), lin=nn.Linear(2, 2), out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    found = exact_everywhere(net, score, x)
    assert [p.name for p in found if p.kind == "operation"] == [
        *("reshape#0", "reshape#1", "movedim#0", "movedim#1", "reshape#2"),
    ]
    h = net.a(x[None]).detach()
    close(
        eg.tap(score, ["reshape#0", "reshape#1", "movedim#0"])(x), (x, h.reshape(2, 36), h.reshape(2, 36).T)
    )


def test_what_the_library_computes_is_no_operation_of_the_score():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(1, 1)

        def forward(self, x):
            return eg.mark(self.a(x).tanh(), "mark") + x.permute(0, 1, 3, 2)

    block = Inner()
    score, x, zero = score_of(nn.Sequential(block, nn.Tanh(), block)), torch.randn(X), torch.zeros(X)
    names = eg.places(score, x).names
    assert names == tuple(
        n if n == "1" else n + c
        for c in ("#0", "#1")
        for n in ("0.a", "0.tanh", "mark", "0.permute", "0.add", "0", "1")
        if n + c != "1#1"
    )
    single = {n: eg.activation_and_gradient(score, n)(x) for n in names}
    for edited in ("0#0:in", "0#0", "mark#0", "0.a#0", "0.tanh#0", "mark#1", "0#1:in"):
        for other in ("0.add#0", "0.permute#0", "0.add#1", "0.permute#1"):
            a, g = eg.activation_and_gradient(score, [edited, other])(x)
            close((a[1], g[1]), single[other])
            nudged = lambda x: eg.nudge(score, edited)(x, zero)
            close(eg.tap(nudged, other)(x), single[other][0])
        put = eg.tap(score, edited)(x)
        assert eg.places(lambda x: eg.nudge(score, edited)(x, zero), x).names == names
        assert eg.places(lambda x: eg.replace(score, edited)(x, put), x).names == names


def test_markers_in_plain_functions():
    def score(x):
        h = eg.mark(torch.tanh(2 * x), "hidden")
        return (eg.mark(h * h, "energy") * x.exp()).sum()

    x = torch.randn(1, 5)
    assert eg.mark(x, "alone") is x
    found = eg.places(score, x)
    assert found.names == ("mul#0", "tanh", "hidden", "mul#1", "energy", "exp", "mul#2")
    assert found["hidden"].kind == "marker"
    assert found["hidden"].beside == ("input",)
    assert found["mul#2"].cut
    assert_alike(eg.tap(score, "hidden")(x), torch.tanh(2 * x))
    z = torch.randn(1, 5)
    close(eg.replace(score, "hidden")(x, z), (z**2 * x.exp()).sum())
    close(eg.activation_and_gradient(score, "hidden")(x)[1], 2 * torch.tanh(2 * x) * x.exp())
    xs = torch.randn(4, 1, 5)
    close(vmap(eg.activation_and_gradient(score, "hidden"))(xs)[1], 2 * torch.tanh(2 * xs) * xs.exp())
    close(hessian(lambda z: eg.replace(score, "hidden")(x, z))(z).diagonal(0, 1, 3).sum(), 2 * x.exp().sum())
    twice = lambda x: (eg.mark(x, "v") * 2 + eg.mark(3 * x, "v")).sum()
    assert torch.equal(eg.tap(twice, "v#1")(x), 3 * x)
    close(eg.nudge(twice, "v#0")(x, torch.ones(1, 5)), twice(x) + 10)


def test_markers_around_and_inside_of_networks():
    inside = Net(lambda s, x: s.out(eg.mark(s.a(x).exp(), "inner")), a=conv(1, 2), out=conv(2, 1))
    model = eg.from_module(inside)
    score = lambda x: eg.mark(model(eg.mark(2 * x, "before")), "after").square().sum()
    x, xs = torch.randn(X), torch.randn(3, *X)
    assert exact_everywhere(inside, score, x).names == ("mul", "before", "a", "exp", "inner", "out", "after")
    close(vmap(eg.tap(score, "inner"))(xs), inside.a(2 * xs).exp().detach())
    close(vmap(eg.tap(score, ("before", "inner", "after")))(xs)[0], 2 * xs)
    close(eg.tap(score, "after")(x), model(2 * x))
    close(eg.replace(score, "before")(x, x), model(x).square().sum())


def test_a_model_called_twice_and_two_models():
    net, other = built("chain"), nn.Sequential(conv(2, 2), nn.Softplus()).eval()
    model, second = eg.from_module(net), eg.from_module(other)
    x = torch.randn(X)
    flipped = lambda x: (model(x) + model(x.flip(-1)).flip(-1)).square().sum()
    found = exact_everywhere(net, flipped, x, moved=False)
    assert found.names == tuple(n + c for c in ("#0", "#1") for n in ("0", "1.0", "1.1", "1", "2", "3"))
    assert not any(p.cut for p in found)
    close(eg.tap(flipped, "0#1")(x), net[0](x.flip(-1)[None])[0].detach())
    z = torch.randn(2, 6, 6)
    rest = lambda z: net[1](z[None])[0]
    expected = (rest(z) + model(x.flip(-1)).flip(-1)).square().sum().detach()
    close(eg.replace(flipped, "0#0")(x, z), expected, tolerance=1e-4)
    expected = (model(x) + rest(z).flip(-1)).square().sum().detach()
    close(eg.replace(flipped, "0#1")(x, z), expected, tolerance=1e-4)
    both = eg.replace(flipped, ["0", "0#1"])(x, (z, z))
    close(both, (rest(z) + rest(z).flip(-1)).square().sum().detach(), tolerance=1e-4)
    xs = torch.randn(3, *X)
    close(vmap(eg.tap(flipped, "0#1"))(xs), net[0](xs.flip(-1)).detach())

    chained = lambda x: second(model(x)).sum()
    found = exact_everywhere(net, chained, x, moved=False)
    assert [n for n in found.names if "#" in n] == ["0#0", "1#0", "0#1", "1#1"]
    assert all(p.cut for p in found)
    close(eg.tap(chained, "0#1")(x), other[0](net(x[None]))[0].detach())
    (g,) = torch.autograd.grad(other(v := net(x[None]).detach().requires_grad_()).sum(), v)
    close(eg.activation_and_gradient(chained, "3")(x)[1], g[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*net.modules(), *other.modules()])


def test_a_score_that_maps_the_model_itself():
    net = built("chain")
    model = eg.from_module(net)
    score = lambda x: vmap(model)(torch.stack([x, 2 * x])).square().sum()
    x = torch.randn(X)
    with refused(ValueError, "tap", "passed once by the score", "'0' inside of a vmap or grad"):
        eg.tap(score, "0")(x)
    with refused(ValueError, r"\w+", "passed once by the score", "'0' inside"):
        eg.activation_and_gradient(score, "0")(x)
    slopes = lambda x: grad(lambda z: model(z).square().sum())(x).square().sum()
    with refused(ValueError, "tap", "passed once by the score", "'0' inside of a vmap or grad"):
        eg.tap(slopes, "0")(x)
    marked = lambda x: vmap(lambda z: eg.mark(2 * z, "q").sum())(torch.stack([x, x])).sum()
    with refused(ValueError, "tap", "passed once by the score", "'q' inside of a vmap or grad"):
        eg.tap(marked, "q")(x)


# ------------------------------------------------------------------ where the first axis is not the batch


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Conv2d(1, 8, 3, padding=1)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.norm = nn.LayerNorm(8)
        self.ff = nn.Linear(8, 8)

    def forward(self, x):
        t = self.embed(x).flatten(2)
        t = t.permute(0, 2, 1) if self.batch_first else t.permute(2, 0, 1)
        t = self.norm(t + self.attend(t, t, t, need_weights=True)[0])
        t = t + self.ff(t).relu()
        return t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0)


class Windows(nn.Module):
    """Windows of two by two voxels go into the batch axis."""

    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.out = conv(2, 4), nn.Linear(4, 4), conv(4, 1)

    def forward(self, x):
        h = self.embed(x)
        b, c, u, v = h.shape
        w = h.reshape(b, c, u // 2, 2, v // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        w = F.gelu(self.lin(w)) + w
        h = w.reshape(b, u // 2, v // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, u, v)
        return self.out(h)


class Frames(nn.Module):
    """The channel becomes the batch, and the batch the channel's place."""

    def __init__(self, channels):
        super().__init__()
        self.a, self.out, self.soft = conv(1, channels), conv(channels, 1), nn.Softplus()

    def forward(self, x):
        return self.out(self.soft(self.a(x).transpose(0, 1)).tanh().transpose(0, 1))


LAYOUTS = {
    "batch first": (lambda: Attention(True), (1, 2, 2), ("attend:0", "relu")),
    "sequence first": (lambda: Attention(False), (1, 2, 2), ("attend:0", "relu", "permute#0")),
    "windows": (Windows, (2, 4, 4), ("lin", "gelu", "reshape#1")),
    "frames": (lambda: Frames(4), (1, 4, 4), ("soft", "tanh")),
}


@pytest.mark.parametrize("which", LAYOUTS)
def test_layouts_where_the_first_axis_is_not_the_batch(which):
    make, shape, names = LAYOUTS[which]
    net = make().eval()
    score = score_of(net)
    with untouched(net):
        exact_everywhere(net, score, torch.randn(shape), moved=False)
        check_layout(net, names, shape)


def check_layout(net, names, shape, counts=(5, 4)):
    """Every example of a batch as alone; batches as large as there are tokens, windows, channels as well."""
    score = score_of(net)
    for count in counts:
        xs = torch.randn((count, *shape))
        for name in names:
            explain, put = eg.activation_and_gradient(score, name), eg.replace(score, name)
            a, g = vmap(explain)(xs)
            moved = vmap(put)(xs, a.flip(0))
            for i in (0, count - 1):
                close((a[i], g[i]), explain(xs[i]), tolerance=1e-4)
                close(moved[i], put(xs[i], a[count - 1 - i]), tolerance=1e-4)


def test_an_axis_of_one_that_is_not_the_batch():
    """With one example, an axis of length one before the batch cannot be told from it by its length."""
    check_layout(Frames(1).eval(), ("soft", "tanh"), (1, 4, 4), (3,))


def test_layouts_of_the_second_run_of_a_model():
    model = eg.from_module(Attention(False).eval())
    score = lambda x: (model(x) + model(x.flip(-1))).square().sum()
    for count in (4, 3):
        xs = torch.randn(count, 1, 2, 2)
        for name in ("norm#0", "norm#1", "attend#1:0"):
            a, g = vmap(eg.activation_and_gradient(score, name))(xs)
            close((a[2], g[2]), eg.activation_and_gradient(score, name)(xs[2]), tolerance=1e-4)


def test_hidden_states_of_recurrent_networks():
    def forward(s, x):
        y, h = s.gru(x)
        return y + s.lin(h[0])[:, None]

    net = Net(forward, gru=nn.GRU(3, 2, batch_first=True), lin=nn.Linear(2, 2))
    score, xs = score_of(net), torch.randn(3, 5, 3)
    y, h = net.gru(xs)
    close(vmap(eg.tap(score, "gru:0"))(xs), y.detach())
    close(vmap(eg.tap(score, "gru:1"))(xs).reshape(3, 2), h[0].detach())
    a, g = vmap(eg.activation_and_gradient(score, "gru:1"))(xs)
    single = [eg.activation_and_gradient(score, "gru:1")(x) for x in xs]
    close((a, g), tuple(torch.stack(s) for s in zip(*single, strict=True)))


def test_networks_that_take_one_example_at_a_time():
    def lonely(s, x):
        assert x.shape[0] == 1
        return s.out(s.a(x).squeeze(0).tanh()[None])

    coupled = lambda s, x: s.out(s.a(x) / s.a(x).abs().mean())
    for forward, names in ((lonely, ("a", "tanh", "squeeze")), (coupled, ("a#0", "a#1", "div"))):
        net = Net(forward, a=conv(1, 2), out=conv(2, 1))
        score, xs = score_of(net), torch.randn(3, *X)
        with pytest.warns(eg.ExecutionWarning, match="one at a time"):
            vmap(score)(xs)
        exact_everywhere(net, score, xs[0])
        for name in names:
            single = [eg.activation_and_gradient(score, name)(x) for x in xs]
            a, g = vmap(eg.activation_and_gradient(score, name))(xs)
            close((a, g), tuple(torch.stack(s) for s in zip(*single, strict=True)))
            put = eg.replace(score, name)
            close(
                vmap(put)(xs, a.flip(0)), torch.stack([put(x, z) for x, z in zip(xs, a.flip(0), strict=True)])
            )


# ------------------------------------------------------------------ doors and states


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks(backend):
    net = built("chain")
    plain, x = score_of(net), torch.randn(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = score_of(torch.compile(net, backend=backend))
        close(compiled(x), plain(x))
        for name in eg.places(plain, x).names:
            trunk, head = eg.split(compiled, name)
            assert_alike(trunk(x), eg.tap(plain, name)(x))
            close(head(trunk(x)), compiled(x))
            close(
                vmap(eg.activation_and_gradient(compiled, name))(x[None]),
                vmap(eg.activation_and_gradient(plain, name))(x[None]),
            )
        assert eg.places(compiled, x).names == eg.places(plain, x).names
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [False, True])
def test_networks_that_are_compiled_in_place(part):
    net, twin = built("chain"), built("chain")
    (net[1] if part else net).compile(backend="eager")
    score, plain, x = score_of(net), score_of(twin), torch.randn(X)
    close(score(x), plain(x))
    names = eg.places(plain, x).names
    try:
        assert eg.places(score, x).names == names
        for name in names:
            assert_alike(eg.tap(score, name)(x), eg.tap(plain, name)(x))
            z = torch.randn_like(eg.tap(score, name)(x))
            close(eg.replace(score, name)(x, z), eg.replace(plain, name)(x, z), tolerance=1e-4)
    finally:
        torch.compiler.reset()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def checkpointed(reentrant):
    return lambda s, x: s.out(checkpoint(s.block, s.a(x).tanh(), use_reentrant=reentrant).tanh())


def test_checkpointed_networks():
    parts = {"a": conv(1, 2), "block": nn.Sequential(conv(2, 2), nn.Tanh()), "out": conv(2, 1)}
    net, plain = (
        Net(checkpointed(False), **parts),
        Net(lambda s, x: s.out(s.block(s.a(x).tanh()).tanh()), **parts),
    )
    score, twin, x = score_of(net), score_of(plain), torch.randn(X)
    with untouched(net):
        found = eg.places(score, x)
        assert found.names == eg.places(twin, x).names
        for p in found:
            z = torch.randn(p.shape)
            assert_alike(eg.tap(score, p.name)(x), eg.tap(twin, p.name)(x))
            tapped = lambda s: lambda v: eg.tap(s, p.name)(v).square().sum()
            close(grad(tapped(score))(x), grad(tapped(twin))(x))
            put = lambda s: lambda z: eg.replace(s, p.name)(x, z)
            nudged = lambda s: lambda v: eg.nudge(s, p.name)(v, z)
            if p.name.startswith("block"):
                for edit, f, at in (("replace", put(score), z), ("nudge", nudged(score), x)):
                    with refused(ValueError, edit, "outside of checkpointed code", f"'{p.name}'", "Switch"):
                        grad(f)(at)
                with refused(ValueError, r"\w+", "outside of checkpointed code", f"'{p.name}'"):
                    eg.activation_and_gradient(score, p.name)(x)
            else:
                close(grad(put(score))(z), grad(put(twin))(z))
                close(grad(nudged(score))(x), grad(nudged(twin))(x))
                xs = torch.randn(3, *X)
                ours, theirs = (eg.activation_and_gradient(s, p.name) for s in (score, twin))
                close(vmap(ours)(xs), vmap(theirs)(xs))


def test_a_change_inside_of_reentrant_checkpointing_is_refused():
    net = Net(checkpointed(True), a=conv(1, 2), block=nn.Sequential(conv(2, 2), nn.Tanh()), out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    with refused(ValueError, r"\w+", "outside of checkpointed code", "'block.0'"):
        grad(lambda d: eg.nudge(score, "block.0")(x, d))(torch.zeros(2, 6, 6))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("door", ["trace", "script", "freeze"])
def test_torchscript_cannot_be_looked_into_and_says_so(door):
    net, x = built("chain"), torch.randn(X)
    script = {
        "trace": lambda: torch.jit.trace(net, x[None]),
        "script": lambda: torch.jit.script(net),
        "freeze": lambda: torch.jit.freeze(torch.jit.script(net)),
    }[door]()
    score = score_of(script)
    inside = "never passed" if door == "freeze" else "TorchScript"  # frozen, it has no parts any more
    with refused(ValueError, "tap", "a place", f"'0'.*{inside}"):
        eg.tap(score, "0")(x)
    with refused(ValueError, "replace", "a place", f"'0'.*{inside}"):
        eg.replace(score, "0")(x, torch.zeros(2, 6, 6))
    assert len(eg.places(score, x)) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_around_a_part_in_torchscript():
    part = torch.jit.script(nn.Sequential(conv(2, 2), nn.Tanh()).eval())
    net = Net(lambda s, x: s.out(s.part(s.a(x)).tanh()), a=conv(1, 2), part=part, out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    for _ in range(3):  # its first runs compile
        score(x)
    assert {"a", "tanh", "out"} <= set(exact_everywhere(net, score, x).names)


def test_exported_programs_have_operations():
    net, xs = built("chain"), torch.randn(3, *X)
    program = torch.export.export(net, (xs,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
    score = score_of(program)
    found = exact_everywhere(program.module(), score, xs[0])
    assert [p for p in found.names if "conv2d" in p] == ["conv2d#0", "conv2d#1"]
    close(vmap(eg.tap(score, "conv2d#0"))(xs), net[0](xs).detach())
    plain = score_of(net)
    close(eg.activation_and_gradient(score, "tanh")(xs[0]), eg.activation_and_gradient(plain, "1.0")(xs[0]))


def branching():
    return Net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else 2 * s.a(x), a=conv(1, 2), b=conv(2, 2))


def test_value_dependent_control_flow():
    net = branching()
    score, x = score_of(net), torch.rand(X)
    assert exact_everywhere(net, score, x, moved=False).names == ("a", "b")
    assert exact_everywhere(net, score, -x, moved=False).names == ("a", "mul")
    with refused(ValueError, "tap", "a place that this input reaches", "'b', a module that was never called"):
        eg.tap(score, "b")(-x)
    xs = torch.stack([x, -x])
    with pytest.warns(eg.ExecutionWarning, match="one at a time"):
        vmap(score)(xs)
    close(vmap(eg.tap(score, "a"))(xs), net.a(xs).detach())


@pytest.mark.filterwarnings("ignore::esegeta.ExecutionWarning")
@pytest.mark.parametrize("order", [[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0, 1.0]])
def test_a_place_that_only_some_of_the_examples_reach_is_refused(order):
    score = score_of(branching())
    xs = torch.rand(X) * torch.tensor(order)[:, None, None, None]
    vmap(score)(xs)
    with refused(ValueError, "tap", "a place", "'b'"):
        vmap(eg.tap(score, "b"))(xs)
    with refused(ValueError, "nudge", "a place", "'b'"):
        vmap(lambda x: eg.nudge(score, "b")(x, torch.ones(2, 6, 6)))(xs)


class Counting(nn.Module):
    def __init__(self, rebinds):
        super().__init__()
        self.a, self.rebinds = conv(1, 2), rebinds
        self.register_buffer("runs", torch.ones(()))

    def forward(self, x):
        if self.rebinds:
            self.runs = self.runs + 1
        else:
            self.runs += 1
        return self.a(x) * self.runs


@pytest.mark.parametrize("rebinds", [False, True])
def test_buffers_that_are_written_are_put_back(rebinds):
    net = nn.Sequential(Counting(rebinds), nn.Tanh(), conv(2, 1)).eval()
    x, xs = torch.randn(X), torch.randn(3, *X)
    expected = 2 * net[0].a(xs).detach()
    score = score_of(net)
    with untouched(net):
        close(eg.tap(score, "0")(x), 2 * net[0].a(x[None])[0].detach())
        close(vmap(eg.tap(score, "0"))(xs), expected)
        eg.activation_and_gradient(score, ["0", "1"])(x)
    fresh = score_of(net)  # looks at places before anything else
    with untouched(net):
        close(vmap(eg.tap(fresh, "0.a"))(xs), expected / 2)


@pytest.mark.parametrize("rebinds", [False, True])
def test_the_listing_puts_buffers_back(rebinds):
    net = nn.Sequential(Counting(rebinds), nn.Tanh(), conv(2, 1)).eval()
    score, x = score_of(net), torch.randn(X)
    with untouched(net):
        assert eg.places(score, x).names == ("0.a", "0.mul", "0", "1", "2")
        exact_everywhere(net, score, x)


def test_reduced_precision():
    net = built("u-net")
    score, x = score_of(net), torch.randn(X)
    with eg.execution(precision="bfloat16"):
        for name in ("enc", "bottom", "cat"):
            trunk, head = eg.split(score, name)
            assert_alike(head(trunk(x)), score(x))
        a, g = eg.activation_and_gradient(score, "bottom")(x)
        many = vmap(eg.tap(score, "bottom"))(x[None])
    a32, g32 = eg.activation_and_gradient(score, "bottom")(x)
    assert a.dtype == g.dtype == many.dtype == torch.float32
    assert not torch.equal(a, a32)
    assert (a - a32).norm() < 0.02 * a32.norm()
    assert (g - g32).norm() < 0.05 * g32.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes(dtype):
    net = built("u-net", dtype)
    score, x = score_of(net), torch.randn(X).to(dtype)
    found = exact_everywhere(net, score, x)
    assert {p.dtype for p in found} == {dtype}
    a, g = eg.activation_and_gradient(score, "bottom")(x)
    assert a.dtype == g.dtype == dtype


def test_without_gradients_and_in_inference_mode():
    net = built("residual")
    score, x = score_of(net), torch.randn(X)
    expected = eg.activation_and_gradient(score, "first")(x)
    names = eg.places(score, x).names
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for y in (x, x.clone()):
                assert_alike(eg.tap(score, "first")(y), expected[0])
                close(eg.activation_and_gradient(score, "first")(y), expected)
                assert_alike(eg.replace(score, "first")(y, expected[0]), score(y))
                trunk, head = eg.split(score, "stem")
                assert_alike(head(trunk(y)), score(y))
    with torch.no_grad():
        assert eg.places(score, x).names == names


def test_the_listing_in_inference_mode():
    net = built("residual")
    score, x = score_of(net), torch.randn(X)
    expected = eg.places(score, x)
    with torch.inference_mode():
        for y in (x, x.clone()):
            assert eg.places(score, y) == expected
            trunk, head = eg.split(score, "stem")
            close(head(2 * trunk(y)), eg.replace(score, "stem")(y, 2 * trunk(y)))


def test_parts_of_the_network_without_gradient():
    def forward(s, x):
        h = s.a(x)
        with torch.no_grad():
            weights = s.gate(x).sigmoid()
        return s.out(h * weights)

    net = Net(forward, a=conv(1, 2), gate=conv(1, 2), out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    found = exact_everywhere(net, score, x, moved=False)
    assert {p.name: p.used for p in found} == {
        **{"a": True, "gate": False, "sigmoid": False, "mul": True, "out": True}
    }
    with refused(ValueError, r"\w+", "a place (that the score depends on|outside of)", "'gate'"):
        eg.activation_and_gradient(score, "gate")(x)


def test_a_way_around_that_autograd_does_not_see_is_still_refused_by_the_head():
    net = Net(lambda s, x: s.out(s.a(x) * s.gate(x).detach()), a=conv(1, 2), gate=conv(1, 2), out=conv(2, 1))
    score, x = score_of(net), torch.randn(X)
    trunk, head = eg.split(score, "a")
    assert_alike(head(trunk(x)), score(x))
    with refused(ValueError, "split", "a cut", "'a': more flows beside it", "at=x"):
        head(1.1 * trunk(x))


def test_weights_that_are_computed_are_no_way_of_the_input():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(conv(1, 2)), nn.Tanh(), conv(2, 1)).eval()
    score, x = score_of(net), torch.randn(X)
    with untouched(net):
        found = eg.places(score, x)
    assert [p.name for p in found if p.used and p.kind == "module"] == ["0", "1", "2"]
    assert not any(p.used for p in found if "parametrizations" in p.name)
    assert all(found[n].cut for n in ("0", "1", "2"))
    close(eg.tap(score, "0")(x), net[0](x[None])[0].detach())


def test_hooks_of_the_user_stay_and_count():
    net, seen = built("chain"), []
    handle = net[0].register_forward_hook(lambda m, args, out: seen.append(1) or 2 * out)
    pre = net[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    score, x = score_of(net), torch.randn(X)
    with untouched(net):
        doubled = 2 * F.conv2d(x[None], net[0].weight, net[0].bias, padding=1)[0]
        close(eg.tap(score, "0")(x), doubled.detach())
        exact_everywhere(net, score, x)
    assert seen
    handle.remove()
    pre.remove()


def test_other_ways_in():
    """Parameters taken out, and networks called as they are: plain functions, with operations."""
    net, x = built("chain"), torch.randn(X)
    for model in (parametrised(net)[0](dict(net.named_parameters())), lambda x: net(x[None])[0]):
        score = square(model)
        found = eg.places(score, x)
        assert "tanh" in found.names
        close(eg.tap(score, "tanh")(x).reshape(2, 6, 6), net[1][0](net[0](x[None]))[0])


# ------------------------------------------------------------------ threads and exceptions


def jobs(net):
    model = eg.from_module(net)
    score = eg.reducers.class_sum(model, 1)
    z = torch.linspace(-1, 1, 128).reshape(8, 4, 4)
    return [
        lambda x: eg.tap(score, "bottom")(x),
        lambda x: eg.replace(score, "bottom")(x, z),
        lambda x: net(x[None]).detach(),
        lambda x: eg.nudge(score, "up")(x, torch.ones(4, 8, 8)),
        lambda x: score(x),
        lambda x: eg.activation_and_gradient(score, ["encoder", "up"])(x)[1][1],
        lambda x: torch.tensor([p.cut for p in eg.places(score, x)]),
        lambda x: eg.tap(score, "cat")(x),
        lambda x: vmap(eg.tap(score, ["pool", "cat"]))(torch.stack([x, -x]))[1],
    ]


# Dry runs silence this warning of torch, but not where threads overlap.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("count", [2, 8])
def test_threads_do_not_see_each_others_edits(count):
    net = zoo.small_unet(2)
    xs = [torch.randn(1, 8, 8) for _ in range(4)]
    expected = [[job(x) for x in xs] for job in jobs(zoo.small_unet(2))]
    work, wrong, start = jobs(net), [], threading.Barrier(count)

    def run(i):
        try:
            start.wait()
            for round_ in range(len(work) if count == 2 else 3):
                j = (i + 3 * round_) % len(work) if count == 2 else (i + round_) % len(work)
                for x, y in zip(xs, expected[j], strict=True):
                    if not alike(work[j](x), y):
                        wrong.append((i, j))
        except BaseException as error:
            wrong.append((i, repr(error)))

    work[4](xs[0])
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    with untouched(net):
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert wrong == []


def test_two_first_runs_at_once_leave_the_buffers_in_place():
    inside, seen = threading.Event(), []

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((), 2.0))

        def forward(self, x):
            seen.append(id(self.scale))
            inside.set()
            time.sleep(0.2)
            return x * self.scale

    net = Slow().eval()
    model, original = eg.from_module(net), id(net.scale)
    first, second = (threading.Thread(target=model, args=(torch.ones(3),)) for _ in range(2))
    first.start()
    inside.wait()
    second.start()
    first.join()
    second.join()
    assert seen == [original] * 2


class Boom(Exception):
    pass


def test_nothing_is_left_after_an_error():
    def forward(s, x):
        h = s.a(x).tanh()
        if s.fails:
            raise Boom
        return s.out(h)

    net = Net(forward, a=conv(1, 2), out=conv(2, 1))
    net.fails = False
    score, x = score_of(net), torch.randn(X)
    edits = [
        lambda: eg.tap(score, "out")(x),
        lambda: eg.tap(score, ["a", "out"])(x),
        lambda: eg.replace(score, "tanh")(x, torch.zeros(2, 6, 6)),
        lambda: eg.nudge(score, "a")(x, torch.zeros(2, 6, 6)),
        lambda: eg.places(score, x),
        lambda: eg.activation_and_gradient(score, "out")(x),
        lambda: vmap(eg.tap(score, "out"))(x[None]),
        lambda: eg.split(score, "out")[0](x),
    ]
    before = [edit() for edit in edits]
    net.fails = True
    with untouched(net):
        for edit in edits:
            with pytest.raises(Boom):
                edit()
        # what was seen before the network fails is enough for a tap
        close(eg.tap(score, "a")(x), net.a(x[None])[0].detach())
        for wrong in ("nowhere", "a#1", "a:2"):
            with pytest.raises((ValueError, Boom)):
                eg.tap(score, wrong)(x)
    net.fails = False
    after = [edit() for edit in edits]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert before[4] == after[4]


def test_activations_are_not_kept_alive():
    net = built("residual")
    score, x = score_of(net), torch.randn(X)
    trunk, head = eg.split(score, "first")
    z = trunk(x)
    head(z)
    eg.places(score, x), eg.activation_and_gradient(score, "first")(x)
    there = weakref.ref(z), weakref.ref(x)
    del z, x
    gc.collect()
    assert [r() for r in there] == [None, None]


# ------------------------------------------------------------------ edits of edits


def unet():
    net = zoo.small_unet(2)
    return net, eg.reducers.class_sum(eg.from_module(net), 1), torch.randn(1, 8, 8)


def test_edits_of_edits():
    net, score, x = unet()
    z = torch.rand(4, 8, 8)
    put = lambda x: eg.replace(score, "encoder")(x, z)
    pooled = net.pool(z[None])
    assert_alike(eg.tap(put, "pool")(x), pooled[0])
    assert torch.equal(eg.tap(put, "encoder")(x), z)
    # the outer edit comes after the inner one
    assert_alike(eg.nudge(put, "encoder")(x, z), eg.replace(score, "encoder")(x, 2 * z))
    other = lambda x: eg.nudge(score, "pool")(x, pooled[0])
    expected = eg.tap(lambda x: eg.replace(score, "pool")(x, 2 * pooled[0]), "bottom")(x)
    close(eg.tap(lambda x: eg.nudge(put, "pool")(x, pooled[0]), "bottom")(x), expected)
    close(eg.replace(other, "encoder")(x, z), eg.nudge(put, "pool")(x, pooled[0]))
    three = lambda x: eg.nudge(lambda v: eg.nudge(put, "up")(v, z), "up")(x, z)
    close(three(x), eg.nudge(put, "up")(x, 2 * z))
    close(vmap(three)(x[None])[0], three(x))
    # taps of taps, and the two runs of one function
    model = eg.from_module(net)
    assert_alike(eg.tap(eg.tap(model, "up"), "pool")(x), eg.tap(score, "pool")(x))
    twice = lambda x: eg.tap(score, "encoder")(x).sum() + eg.tap(score, "up")(2 * x).sum()
    assert_alike(eg.tap(twice, "encoder#1")(x), eg.tap(score, "encoder")(2 * x))
    assert_alike(eg.tap(twice, "bottom")(x), eg.tap(score, "bottom")(2 * x))


def test_a_place_in_the_head():
    _net, score, x = unet()
    head = eg.split(score, "encoder", at=x)[1]
    z = eg.tap(score, "encoder")(x)
    assert_alike(eg.tap(head, "bottom")(z), eg.tap(score, "bottom")(x))
    close(eg.activation_and_gradient(head, "bottom")(z), eg.activation_and_gradient(score, "bottom")(x))
    trunk2, head2 = eg.split(head, "bottom", at=z)
    assert_alike(head2(trunk2(z)), score(x))


def test_the_listing_of_what_is_made_of_places():
    net, score, x = unet()
    model = eg.from_module(net)
    all_names = eg.places(score, x).names
    assert eg.places(eg.tap(model, "up"), x).names == all_names[: all_names.index("up") + 1]
    zero = torch.zeros(8, 4, 4)
    found = eg.places(lambda x: eg.nudge(score, "bottom")(x, zero), x)
    assert found.names == all_names
    assert found["decoder"].cut
    assert tensors(found, found["bottom"].beside) == ("encoder.relu",)
    head = eg.split(score, "encoder", at=x)[1]
    found = eg.places(head, eg.tap(score, "encoder")(x))
    assert found["decoder"].cut
    assert not found["bottom"].cut
    assert not found["encoder.conv"].used


def test_at_is_the_method_on_the_head():
    _net, score, x = unet()
    baseline = torch.zeros_like(x)
    trunk, head = eg.split(score, "bottom", at=x)
    expected = eg.integrated_gradients(head, steps=4)(trunk(x), trunk(baseline))
    for method in (eg.integrated_gradients, "integrated_gradients"):
        explain = eg.at(method, "bottom")(score, steps=4)
        close(explain(x, baseline), expected)
    close(eg.at("gradient", "bottom")(score)(x), eg.activation_and_gradient(score, "bottom")(x)[1])
    close(expected.sum(), score(x) - head(trunk(baseline)), tolerance=0.2)
    # inside of itself: the outer place is a place of the inner head
    inner = eg.at(eg.at(eg.gradient, "bottom"), "encoder")(score)(x)
    close(inner, eg.activation_and_gradient(score, "bottom")(x)[1])
    several = eg.at("gradient", ["bottom", "encoder"])(score)(x)
    together = grad(lambda zs: eg.replace(score, ["bottom", "encoder"])(x, zs))(
        eg.tap(score, ["bottom", "encoder"])(x)
    )
    close(several, together, tolerance=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
def test_batches_in_chunks(chunk):
    _, score, _ = unet()
    xs = torch.randn(5, 1, 8, 8)
    layered = eg.at("integrated_gradients", "bottom")(score, steps=3)
    trunk, head = eg.split(score, "encoder")
    by_hand = lambda x: eg.integrated_gradients(head, steps=3)(trunk(x), trunk(0 * x))
    single = [(layered(x, 0 * x), eg.grad_cam(score, "up")(x), by_hand(x)) for x in xs]
    with eg.execution(chunk=chunk):
        got = (
            eg.batched(layered)(xs, 0 * xs),
            eg.batched(eg.grad_cam(score, "up"))(xs),
            eg.batched(by_hand)(xs),
        )
    close(got, tuple(torch.stack(s) for s in zip(*single, strict=True)), tolerance=1e-4)


def test_dry_runs():
    _, score, x = unet()
    assert eg.forecast(eg.activation_and_gradient(score, "bottom"), x) > 0
    assert eg.forecast(eg.at("integrated_gradients", "bottom")(score, steps=2), x, 0 * x) > 0
    trunk, head = eg.split(score, "encoder")
    assert eg.forecast(lambda x: head(trunk(x)), x) > 0
    z = trunk(x)
    close(head(1.1 * z), eg.replace(score, "encoder")(x, 1.1 * z))  # knows values after a run without any


# ------------------------------------------------------------------ several places


def test_several_places_at_once():
    net, score, x = unet()
    names = ["up", "encoder", "pool"]
    single = [eg.tap(score, n)(x) for n in names]
    taps = eg.tap(score, names)(x)
    assert isinstance(taps, tuple)
    assert all(map(alike, taps, single))
    runs = []
    handle = net.encoder.conv.register_forward_hook(lambda *_: runs.append(1))
    model_score = eg.reducers.class_sum(eg.from_module(net), 1)
    explain = eg.activation_and_gradient(model_score, names)
    explain(x)
    runs.clear()
    a, g = explain(x)
    assert len(runs) == 1  # one pass, however many places
    handle.remove()
    for i, n in enumerate(names):
        assert_alike(a[i], single[i])
        close(g[i], eg.activation_and_gradient(score, n)(x)[1])
    zs = tuple(torch.randn_like(t) for t in single)
    expected = net.out(net.decoder(torch.cat([zs[0], zs[1]])[None])).detach()[0, 1].sum()
    close(eg.replace(score, names)(x, zs), expected)
    # a place and the module that hands the same tensor on: the later one wins
    one, two = torch.zeros(4, 8, 8), torch.ones(4, 8, 8)
    both = eg.replace(score, ["encoder.relu", "encoder"])(x, (one, two))
    assert_alike(both, eg.replace(score, "encoder")(x, two))


def test_several_places_that_are_a_cut_together():
    net, score, x = unet()
    beside = eg.places(score, x)["bottom"].beside
    trunk, head = eg.split(score, ["bottom", *beside])
    zs = trunk(x)
    assert_alike(head(zs), score(x))
    moved = tuple(1.1 * z for z in zs)
    expected = net.out(net.decoder(torch.cat([net.up(moved[0][None]), moved[1][None]], 1)))
    close(head(moved), expected.detach()[0, 1].sum(), tolerance=1e-4)
    close(grad(lambda zs: head(zs))(moved)[1].shape, moved[1].shape)


def test_every_skip_of_the_brain_network_makes_a_cut():
    net = zoo.brain_extraction_unet()
    score, x = eg.reducers.class_mean(eg.from_module(net), 1), torch.rand(1, 16, 16, 16)
    other = torch.rand(1, 16, 16, 16)
    found = eg.places(score, x)
    for name in ("encoder.1.conv_a", "encoder.2.pool", "encoder.1:1", "decoder.1.getitem"):
        names = [name, *found[name].beside]
        zs = tuple(1.1 * z for z in eg.tap(score, names)(x))
        trunk, head = eg.split(score, names)
        trunk(other)  # the size of the input is known, nothing else
        close(head(zs), eg.replace(score, names)(other, zs))
        close(head(zs), eg.replace(score, names)(x, zs))


def test_every():
    _, score, x = unet()
    names = eg.all_places(score, x)
    found = eg.places(score, x)
    assert set(names) <= set(found.names)
    maps = eg.all_places(score, x, grids=True)
    assert set(maps) <= set(names)
    assert all(len(found[n].shape) == 3 for n in maps)
    classifier = eg.reducers.logit(eg.from_module(zoo.small_classifier(2)), 1)
    assert "linear" in eg.all_places(classifier, x)
    assert "linear" not in eg.all_places(classifier, x, grids=True)
    assert "conv_b" in eg.all_places(classifier, x, grids=True)


def test_every_tensor_once():
    """A block hands on the tensor of its last layer: one of the two names will do."""
    _, score, x = unet()
    names = eg.all_places(score, x)
    assert len({"encoder", "encoder.relu"} & set(names)) == 1
    assert len({"decoder", "decoder.relu"} & set(names)) == 1


def test_the_table():
    _, score, x = unet()
    found = eg.places(score, x)
    lines = str(found).splitlines()
    assert len(lines) == len(found)
    assert re.match(
        r"^bottom +module +\(8, 4, 4\) +beside: encoder(.relu)?$", lines[found.names.index("bottom")]
    )
    assert re.match(r"^cat +operation +\(8, 8, 8\) +cut$", lines[found.names.index("cat")])
    assert found[0].name == "encoder.conv"
    assert found["cat"] is found[found.names.index("cat")]
    with pytest.raises(
        KeyError, match=r"places: expected the name of a place, got 'botom'\. Nearest: bottom"
    ):
        found["botom"]


def test_scores_that_only_count():
    """Nothing to differentiate: the network's result takes the place of the score."""
    net = zoo.small_unet(2)
    score, x = eg.reducers.predicted_count(eg.from_module(net), 1), torch.randn(1, 8, 8)
    found = eg.places(score, x)
    assert found["decoder"].cut
    assert tensors(found, found["bottom"].beside) == ("encoder.relu",)
    trunk, head = eg.split(score, "bottom")
    assert_alike(head(trunk(x)), score(x))
    assert facts_of(head).differentiable is False
    with pytest.raises(ValueError, match="differentiable"):
        eg.gradient(head)


# ------------------------------------------------------------------ what is refused


@pytest.fixture
def our_own_messages():
    """The run-time type checks of the tests would refuse wrong types before the library can."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def edits(score, place):
    """Every function that takes a place, called on it."""
    x, z = torch.randn(1, 8, 8), torch.zeros(4, 8, 8)
    return {
        "tap": lambda: eg.tap(score, place)(x),
        "replace": lambda: eg.replace(score, place)(x, z),
        "nudge": lambda: eg.nudge(score, place)(x, z),
        "split": lambda: eg.split(score, place)[0](x),
        "at": lambda: eg.at(eg.gradient, place)(score)(x),
        "activation_and_gradient": lambda: eg.activation_and_gradient(score, place)(x),
    }


ALL_EDITS = ["tap", "replace", "nudge", "split", "at", "activation_and_gradient"]


@pytest.mark.parametrize("edit", ALL_EDITS)
def test_a_place_that_does_not_exist(edit):
    net, score, _ = unet()
    with untouched(net):
        for wrong, near in (
            ("encodr.conv", "Nearest: encoder.conv"),
            ("encoder.cov", "Nearest: encoder.conv"),
            ("Encoder", "Nearest: encoder"),
            ("xyz123", r"esegeta\.places\(score, x\) lists them"),
            ("encoder.conv.weight", "Nearest: encoder.conv"),
            ("tanh", "places"),
            ("decoder.relu.relu", "Nearest: decoder.relu"),
        ):
            with refused(
                ValueError, r"\w+", "a place of this score", f"'{wrong}', which is never passed", near
            ):
                edits(score, wrong)[edit]()


@pytest.mark.parametrize("edit", ALL_EDITS)
def test_a_call_that_does_not_happen(edit):
    _, score, _ = unet()
    with refused(ValueError, r"\w+", "a call of 'encoder' that happens", "#3, but there is 1", "from 0"):
        edits(score, "encoder#3")[edit]()
    with refused(ValueError, r"\w+", "a call of 'cat' that happens", "#1, but there is 1"):
        edits(score, "cat#1")[edit]()


@together("edit", ALL_EDITS)
@together("wrong", ["", "#1", ":0", " encoder", "encoder#", "encoder#-1", "encoder:", "a:b:c", "a#1#2"])
def test_what_is_no_place(edit, wrong):
    _, score, _ = unet()
    with refused(ValueError, r"\w+", 'a place such as "encoder.0"', re.escape(repr(wrong))):
        edits(score, wrong)[edit]()


@pytest.mark.usefixtures("our_own_messages")
@pytest.mark.parametrize("edit", ALL_EDITS)
def test_places_of_other_types(edit):
    _, score, _ = unet()
    for wrong in (None, 3, 0.5, {"encoder"}, {"encoder": 1}, nn.ReLU(), [], ()):
        with refused(TypeError, r"\w+", "a place or a sequence of places", "", "encoder.0"):
            edits(score, wrong)[edit]()
    for wrong in (["encoder", 3], ["encoder", None], ["encoder", ["up"]]):
        with refused(ValueError, r"\w+", 'a place such as "encoder.0"', ""):
            edits(score, wrong)[edit]()
    for wrong in (["encoder", "encoder"], ("up", "encoder", "up#0")):
        with refused(ValueError, r"\w+", "each place once", wrong[0], "Remove"):
            edits(score, wrong)[edit]()


def test_the_wrong_leaf_of_a_single_tensor():
    _, score, x = unet()
    assert_alike(eg.tap(score, "encoder:0")(x), eg.tap(score, "encoder")(x))
    for wrong in ("encoder:1", "encoder:main", "encoder:in.1", "encoder:in.x"):
        with refused(ValueError, "tap", "one tensor of 'encoder'", f"'{wrong}'") as caught:
            eg.tap(score, wrong)(x)
        assert "no tensor'" not in str(caught.value)  # advice that can be followed


@pytest.mark.usefixtures("our_own_messages")
def test_what_cannot_be_put_in():
    _, score, x = unet()
    z = eg.tap(score, "encoder")(x)
    for wrong in (z[:1], z[None], z.flatten(), z[:, :1], z[..., 0], torch.zeros(())):
        shape = re.escape(str(tuple(wrong.shape)))
        with refused(ValueError, "replace", r"a replacement of shape \(4, 8, 8\) at 'encoder'", shape, "tap"):
            eg.replace(score, "encoder")(x, wrong)
        with refused(ValueError, "replace", r"a replacement of shape \(4, 8, 8\) at 'encoder'", shape, "tap"):
            vmap(lambda x: eg.replace(score, "encoder")(x, wrong))(x[None])
    for wrong in (z[:2], z[None], z.flatten(), z[..., 0], torch.zeros(3, 1, 1), torch.zeros(())):
        shape = re.escape(str(tuple(wrong.shape)))
        with refused(
            ValueError, "nudge", r"a nudge that broadcasts to \(4, 8, 8\) at 'encoder'", shape, "tap"
        ):
            eg.nudge(score, "encoder")(x, wrong)
    for small in (z[:1], z[:, :1], z[:, :1, :1], torch.ones(1, 1, 1)):
        whole = eg.nudge(score, "encoder")(x, small.expand(4, 8, 8))
        assert_alike(eg.nudge(score, "encoder")(x, small), whole)
    for edit, f in (("replace", eg.replace), ("nudge", eg.nudge)):
        for wrong in (z.int(), z.bool(), z.to(torch.complex64)):
            with refused(TypeError, edit, "at 'encoder' of a floating dtype", r"\(4, 8, 8\)"):
                f(score, "encoder")(x, wrong)
        for wrong in (None, 3.0, z.tolist(), "zero", (z,)):
            with refused(TypeError, edit, "at 'encoder' to be a torch.Tensor", "", "Convert"):
                f(score, "encoder")(x, wrong)
        for wrong in ((z,), (z, z, z), ()):
            with refused(ValueError, edit, "2 tensors, one for each place", str(len(wrong))):
                f(score, ["encoder", "up"])(x, wrong)


def test_places_after_the_reducer_and_whole_numbers():
    net = zoo.small_unet(2)
    model, x = eg.from_module(net), torch.randn(1, 8, 8)
    total = lambda x: 2 * eg.mark(model(x).sum(), "total")
    assert_alike(2 * eg.tap(total, "total")(x), total(x))
    assert "total" not in eg.places(total, x).names
    for f in (
        lambda: eg.split(total, "total")[0](x),
        lambda: eg.at(eg.gradient, "total")(total)(x),
        lambda: eg.activation_and_gradient(total, "total")(x),
    ):
        with refused((ValueError, TypeError), r"\w+", "a place", "'total'", "before the reducer"):
            f()
    labels = Net(lambda s, x: s.out(s.a(x).argmax(1, keepdim=True).float()), a=conv(1, 3), out=conv(1, 1))
    score = score_of(labels)
    assert eg.tap(score, "argmax")(x).dtype == torch.int64
    assert "argmax" not in eg.places(score, x).names
    for f in (
        lambda: eg.split(score, "argmax")[0](x),
        lambda: eg.replace(score, "argmax")(x, torch.ones(1, 8, 8)),
        lambda: eg.nudge(score, "argmax")(x, torch.ones(1, 8, 8)),
        lambda: eg.activation_and_gradient(score, "argmax")(x),
        lambda: eg.at(eg.gradient, "argmax")(score)(x),
    ):
        with refused(TypeError, r"\w+", "floating activations", r"int64\(1.*\) at 'argmax'", "before"):
            f()


def test_the_listing_is_called_outside_with_an_image():
    _, score, x = unet()
    inside = lambda x: eg.places(score, x) and x.sum()
    with refused(ValueError, "places", "outside of vmap and grad", "a call inside"):
        vmap(inside)(x[None])
    with refused(ValueError, "places", "outside of vmap and grad", "a call inside"):
        grad(inside)(x)
    with refused(TypeError, "places", "x of a floating dtype", r"int32\(1, 8, 8\)"):
        eg.places(score, x.int())
    with refused(ValueError, "places", "finite values in x", "64 NaN"):
        eg.places(score, x * float("nan"))
    with refused(ValueError, "places", "x with elements", r"\(0, 8, 8\)"):
        eg.places(score, x[:0])


@pytest.mark.usefixtures("our_own_messages")
def test_names_that_cannot_be_asked_for():
    x = torch.randn(X)
    for wrong in ("a#1", "#", "", " a", None, 3, ["a"], "a#0"):
        with pytest.raises(ValueError, match=r"(?s)^mark: expected .*, got .*\. .*\.$"):
            eg.mark(x, wrong)
    for wrong in (3.0, None, [x]):
        with refused(TypeError, "mark", "z to be a torch.Tensor", ""):
            eg.mark(wrong, "a")
    for fine in ("a", "a b", "level.3", "größe"):
        assert eg.mark(x, fine) is x
        assert torch.equal(eg.tap(lambda x: eg.mark(3 * x, fine), fine)(x), 3 * x)


@pytest.mark.parametrize("wrong", ["a:b", "a\n", "a:0"])
def test_names_with_a_colon_or_a_line_break(wrong):
    with refused(ValueError, "mark", "a label.* without # and :", re.escape(repr(wrong))):
        eg.mark(torch.zeros(1, 2), wrong)


def test_heads_on_activations_that_nobody_knows():
    _, score, x = unet()
    head = eg.split(score, "bottom")[1]
    unknown = torch.randn(8, 4, 4)
    with refused(
        ValueError, "split", "an activation like those of the trunk, or at=x", r"\(8, 4, 4\)", "trunk"
    ):
        head(unknown)
    trunk, head = eg.split(score, "bottom")
    z = trunk(x)
    advice = r"at=x.*cut at all of \['bottom', 'encoder(.relu)?'\]"
    for other in (unknown, 1.1 * z, z + 0):
        with refused(ValueError, "split", "a cut", "'bottom': more flows beside it, through encoder", advice):
            head(other)
    with refused(ValueError, "split", "a cut", "'bottom'"):
        grad(head)(z)
    with refused(ValueError, "split", "an activation like", r"\(8, 2, 2\)"):
        head(torch.randn(8, 2, 2))
    assert_alike(head(z), score(x))  # still known
    around = eg.split(score_of(built("global residual")), "a")
    with refused(ValueError, "split", "a cut", "'a': more flows beside it, through input", "at=x"):
        around[1](2 * around[0](torch.randn(X)))
    # a cut needs to know the size of the input, and nothing else
    trunk, head = eg.split(score, "encoder")
    with refused(ValueError, "split", "like those of the trunk", r"\(4, 8, 8\)"):
        head(torch.randn(4, 8, 8))
    trunk(x)
    z = torch.randn(4, 8, 8)
    close(head(z), eg.replace(score, "encoder")(x, z))
    # each activation belongs to the input that it came from
    trunk, head = eg.split(score, "bottom")
    y = torch.randn(1, 8, 8)
    zs = trunk(x), trunk(y)
    assert_alike(head(zs[0]), score(x))
    assert_alike(head(zs[1]), score(y))


@pytest.mark.usefixtures("our_own_messages")
def test_what_a_split_is_frozen_at():
    _, score, x = unet()
    for wrong in ("x", None, 3):
        if wrong is not None:
            with refused(TypeError, "split", "at to be a torch.Tensor", ""):
                eg.split(score, "bottom", at=wrong)
    with refused(TypeError, "split", "at of a floating dtype", "int32"):
        eg.split(score, "bottom", at=x.int())
    frozen = eg.split(score, "bottom", at=x)[1]
    y = torch.randn(1, 8, 8)
    z = eg.tap(score, "bottom")(y)
    close(frozen(z), eg.replace(score, "bottom")(x, z))
    with pytest.raises(ValueError, match="expected the name of a method, got 'nonsense'"):
        eg.at("nonsense", "bottom")
