"""Random models and the maps of their draws: closed forms, keys, and a network that stays as it was."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import esegeta as eg
from esegeta import random, uncertainty
from esegeta.engine.dropping import Tape
from esegeta.uncertainty.sampling import Spread, _dice, _pack
from esegeta.zoo.drawn import drawn


class Drop(nn.Module):
    """Dropout spelled in one of many ways."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling

    def forward(self, x):
        return self.spelling(x)


class DropPath(nn.Module):
    """As in timm and MONAI: no operation of its own, identity in evaluation mode."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, True

    def forward(self, x):
        assert not self.training
        return x


class Dropped(nn.Module):
    """Convolutions, batch norm, a skip from before the first dropout, and dropout twice."""

    def __init__(self, dims=2, inplace=False, rate=0.5):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a = conv(1, 4, 3, padding=1)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4)
        self.drop = nn.Dropout(rate, inplace=inplace)
        self.b = conv(4, 4, 3, padding=1)
        self.c = conv(8, 2, 1)

    def forward(self, x):
        skip = self.norm(self.a(x)).relu_()
        h = functional.dropout2d(self.b(self.drop(skip)).relu(), 0.25, training=self.training)
        return self.c(torch.cat([h, skip], 1))


def net(dims=2, **settings):
    return drawn(lambda: Dropped(dims, **settings), 3)


def close(a, b):
    """Equal but for rounding: other batches take other kernels."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


X = (torch.arange(64.0) * 0.7).sin().reshape(1, 8, 8)


def test_mean_and_variance_of_one_layer_are_the_closed_form():
    """y = sum_i w_i m_i x_i / (1 - p) has mean sum w x and variance sum (w x)^2 p / (1 - p), in every voxel."""
    layer = nn.Sequential(nn.Dropout(0.3), nn.Conv1d(6, 3, 1)).double().eval()
    voxels, draws = 4096, 16
    x = torch.linspace(-1, 2, 6).double()[:, None].expand(6, voxels)
    with torch.no_grad():
        mean = layer(x[None])[0, :, 0]
        variance = (layer[1].weight[:, :, 0] * x[:, 0]).square().sum(1) * 0.3 / 0.7
        found = uncertainty.monte_carlo(uncertainty.dropout(layer), samples=draws)(x, key=5)
    n = voxels * draws
    assert ((found.mean.mean(1) - mean).abs() < 5 * (variance / n).sqrt()).all()
    unbiased = found.variance.mean(1) * draws / (draws - 1)
    assert ((unbiased / variance - 1).abs() < 5 * (3 / n) ** 0.5).all()


def spelled_by_torch(fn, p):
    """Mean and mean square of the answer of torch's own dropout to ones."""
    torch.manual_seed(0)
    many = torch.cat([fn(torch.ones(1, 64, 4, 4), p, True) for _ in range(100)])
    return many.mean(), many.square().mean()


def test_every_dropout_has_the_distribution_that_it_has_in_training():
    spellings = {
        "dropout": (functional.dropout, nn.Dropout(0.4)),
        "dropout2d": (functional.dropout2d, nn.Dropout2d(0.4)),
        "alpha": (functional.alpha_dropout, nn.AlphaDropout(0.4)),
        "feature alpha": (functional.feature_alpha_dropout, nn.FeatureAlphaDropout(0.4)),
        "torch": (torch.dropout, Drop(lambda x: torch.dropout(x, 0.4, False))),
        "in place": (functional.dropout, nn.Dropout(0.4, inplace=True)),
        "functional": (functional.dropout, Drop(lambda x: functional.dropout(x, p=0.4, training=False))),
    }
    x = torch.ones(64, 4, 4)
    for name, (reference, module) in spellings.items():
        model = uncertainty.dropout(nn.Sequential(nn.Identity(), module).eval())
        many = torch.stack([model(x, key=k) for k in range(50)])
        mean, square = spelled_by_torch(reference, 0.4)
        assert abs(many.mean() - mean) < 0.06, name
        assert abs(many.square().mean() - square) < 0.15, name
        whole = (many[0] == many[0, :, :1, :1]).all()
        assert whole == (name in ("dropout2d", "feature alpha")), name
    path = uncertainty.dropout(DropPath(0.25).eval())
    seen = torch.stack([path(x, key=k).flatten()[:2] for k in range(400)])
    assert seen.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (seen[:, 0] == seen[:, 1]).all()
    assert abs((seen[:, 0] == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_key_one_answer_whatever_goes_through_beside_it(dims):
    model = uncertainty.dropout(drawn(lambda: Dropped(dims), 3) if dims != 1 else flat())
    x = (torch.arange(4.0**dims) * 0.7).sin().reshape(1, *[4] * dims)
    one = [model(x, key=k) for k in (3, 4, 5)]
    assert not torch.equal(one[0], one[1])
    keys = torch.tensor([3, 4, 5])
    both = torch.func.vmap(lambda key: model(x, key=key))(keys)
    for a, b in zip(one, both, strict=True):
        close(a, b)
    many = torch.func.vmap(lambda x, key: model(x, key=key))(torch.stack([x, -x, 2 * x]), keys)
    close(many[0], one[0])
    answers = []
    for chunk in (1, 3, 7):
        with eg.execution(chunk=chunk):
            answers.append(uncertainty.monte_carlo(model, samples=7, link="softmax")(x, key=9))
    for other in answers[1:]:
        for a, b in zip(answers[0], other, strict=True):
            close(a, b)
    stacked = torch.func.vmap(uncertainty.monte_carlo(model, samples=4), randomness="error")
    close(
        stacked(torch.stack([x, -x]), key=9).variance[1],
        uncertainty.monte_carlo(model, samples=4)(-x, key=9).variance,
    )


def flat():
    """For one axis, in which torch has no dropout2d of what it takes for one example."""
    return drawn(lambda: nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv1d(4, 2, 1)), 3)


def plain(model, x, samples, key):
    """The draws one by one, nothing repeated."""
    word = random.fold_in(key, 0)
    return torch.stack([model(x, key=random.fold_in(word, torch.tensor(i))) for i in range(samples)])


@pytest.mark.parametrize("inplace", [False, True])
def test_what_comes_before_the_first_dropout_is_computed_once_with_the_same_answers(inplace):
    module = net(inplace=inplace)
    runs = []
    weight = module.a.weight
    model = uncertainty.dropout(module)
    with eg.execution(chunk=2):
        found = uncertainty.monte_carlo(model, samples=8, link="softmax")(X, key=2)
    p = plain(model, X, 8, 2).softmax(1)
    close(found.mean, p.mean(0))
    close(found.variance, p.var(0, correction=0))
    close(found.entropy, torch.special.entr(p.mean(0)).sum(0, keepdim=True))
    close(found.mutual_information[0], found.entropy[0] - torch.special.entr(p).sum(1).mean(0))
    hook = module.a.register_forward_pre_hook(lambda *_: runs.append(1))
    real = torch.nn.functional.conv2d
    made = []

    def counted(*arguments, **settings):
        made.append(arguments[1] is weight)
        return real(*arguments, **settings)

    tape = model.repeating()
    try:
        torch.nn.functional.conv2d = counted
        for k in range(4):
            close(tape(X, key=k), model(X, key=k))
    finally:
        torch.nn.functional.conv2d = real
        hook.remove()
    assert len(runs) == 8  # hooks and code run every time, the operations do not
    assert tape._tape.usable != inplace
    assert torch.equal(tape(2 * X, key=0), model(2 * X, key=0))


def test_a_network_that_goes_another_way_is_computed_anew():
    class Fickle(nn.Module):
        times = 0

        def forward(self, x):
            Fickle.times += 1
            return functional.dropout(x + 1 if Fickle.times % 2 else (x * 2).cos(), 0.5, training=False)

    model = uncertainty.dropout(Fickle()).repeating()
    ways = [model(torch.ones(4), key=k) for k in range(4)]
    assert {round(float(v), 4) for way in ways for v in way} <= {
        0.0,
        4.0,
        round(2 * float(torch.tensor(2.0).cos()), 4),
    }
    assert not model._tape.usable
    assert isinstance(model._tape, Tape)


def test_gradients_pass_what_is_computed_once():
    model = uncertainty.dropout(net()).repeating()
    model(X, key=1)
    g = torch.func.grad(lambda x: model(x, key=1).sum())(X)
    other = uncertainty.dropout(net())
    fresh = torch.func.grad(lambda x: other(x, key=1).sum())(X)
    close(g, fresh)
    assert g.abs().max() > 0


def state_of(module):
    """Everything of a module that a run could leave changed."""
    return (
        {n: v.clone() for n, v in module.state_dict().items()},
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m)))
            for m in module.modules()
        ],
        [p.requires_grad for p in module.parameters()],
        [p._version for p in (*module.parameters(), *module.buffers())],
    )


def assert_same(before, after):
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert before[1:] == after[1:]


def test_the_network_stays_as_it_was():
    module = nn.Sequential(net(), DropPath(0.1), nn.Conv2d(2, 2, 1)).eval()
    before = state_of(module)
    model = uncertainty.dropout(module, rate={"2": 0.5})
    clean = module(X[None])
    answers: dict[int, torch.Tensor] = {}

    def work(k):
        answers[k] = uncertainty.monte_carlo(model, samples=6, link="softmax")(X, key=k).mean

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    beside = [module(X[None]) for _ in range(10)]  # while the others run it has no dropout here
    for thread in threads:
        thread.join()
    assert all(torch.equal(clean, one) for one in beside)
    for k in (1, 2):
        close(answers[k], uncertainty.monte_carlo(model, samples=6, link="softmax")(X, key=k).mean)
    assert_same(before, state_of(module))
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.ones(3, 8, 8), key=1)
    assert_same(before, state_of(module))
    state = torch.get_rng_state()
    model(X, key=1)
    assert torch.equal(state, torch.get_rng_state())


def test_identical_masks_have_no_variation_and_full_overlap():
    steady = lambda x, key: x + 0.001 * random.signs(key, x.shape)
    found = uncertainty.monte_carlo(steady, samples=5, link="sigmoid")(
        torch.tensor([[3.0, -3.0, 3.0]]), key=1
    )
    assert found.volume_variation.tolist() == [0.0]
    assert found.pairwise_dice.tolist() == [1.0]
    nothing = uncertainty.monte_carlo(steady, samples=5, link="sigmoid")(torch.full((1, 3), -3.0), key=1)
    assert nothing.volume_variation.isnan().all()
    assert nothing.pairwise_dice.isnan().all()
    assert nothing.volumes.tolist() == [[0]] * 5


def test_volumes_and_dice_are_those_of_all_pairs():
    model = lambda x, key: x + random.normal(key, x.shape)
    x = torch.linspace(-2, 2, 3 * 35).reshape(3, 5, 7)
    found = uncertainty.monte_carlo(model, samples=6)(x, key=4)
    assert isinstance(found, Spread)
    with pytest.raises(AttributeError):
        _ = found.entropy
    draws = plain(model, x, 6, 4)
    masks = draws.argmax(1, keepdim=True) == torch.arange(3)[:, None, None]
    sizes = masks.flatten(2).sum(2).double()
    assert torch.equal(found.volumes, sizes.long())
    close(found.volume_variation.double(), sizes.std(0, correction=0) / sizes.mean(0))
    pairs = [(a, b) for a in range(6) for b in range(a)]
    dice = [
        [2 * (masks[a, k] & masks[b, k]).sum() / (sizes[a, k] + sizes[b, k]) for a, b in pairs]
        for k in range(3)
    ]
    close(found.pairwise_dice.double(), torch.tensor(dice).double().nanmean(1))
    many = torch.rand(4, 1, 70_001) > 0.5  # more than one block
    inter = (many[:, 0].float() @ many[:, 0].float().T).double()
    sizes = many.sum(2)
    expected = [2 * inter[a, b] / (sizes[a] + sizes[b]) for a in range(4) for b in range(a)]
    close(_dice(_pack(many), sizes), torch.stack(expected).mean(0))


def test_thresholds_and_links():
    x = torch.tensor([[0.2, 0.7]])
    still = lambda x, key: x + 0 * random.signs(key, x.shape)
    assert uncertainty.monte_carlo(still, samples=2)(x, key=1).volumes.tolist() == [[2], [2]]
    assert uncertainty.monte_carlo(still, samples=2, threshold=0.5)(x, key=1).volumes.tolist() == [[1], [1]]
    found = uncertainty.monte_carlo(still, samples=2, link="sigmoid")(x, key=1)
    p = x.sigmoid()
    close(found.entropy, -(p * p.log() + (1 - p) * (1 - p).log()))  # of yes and no, not zero
    assert found.mutual_information.abs().max() < 1e-6


def test_an_ensemble_takes_every_member_once():
    members = [lambda x: x, lambda x: 3 * x, uncertainty.dropout(nn.Dropout(0.5).eval())]
    with pytest.raises(ValueError, match="a multiple of 3 samples"):
        uncertainty.monte_carlo(uncertainty.ensemble(members), samples=4)
    two = uncertainty.monte_carlo(uncertainty.ensemble(members[:2]))(torch.ones(1, 2), key=0)
    assert two.mean.tolist() == [[2.0, 2.0]]
    assert two.variance.tolist() == [[1.0, 1.0]]
    many = uncertainty.monte_carlo(uncertainty.ensemble(members), samples=6)(torch.ones(1, 64), key=0)
    assert set(((many.mean * 6 - 8).round()).flatten().tolist()) == {0.0, 2.0, 4.0}
    assert uncertainty.ensemble(members)(torch.ones(1, 2), key=3).shape == (1, 2)
    with pytest.raises(ValueError, match="at least two models"):
        uncertainty.ensemble(members[:1])


def test_changes_are_taken_back():
    """A model without a grid of its own answers the same to a changed image, but for interpolation."""
    # Interpolation changes nothing in a field that is linear in space, but for what comes from the border.
    steps = [torch.linspace(-1, 1, n) for n in (24, 20, 16)]
    x = sum(w * g for w, g in zip((1.0, -2.0, 0.5), torch.meshgrid(*steps, indexing="ij"), strict=True))[None]
    every = [
        uncertainty.flip(1),
        uncertainty.affine(degrees=15, scale=0.1, shift=2, spacing=(1.0, 2.0, 1.5)),
        uncertainty.intensity(0.0, 0.0),
        uncertainty.noise(0.0),
    ]
    model = uncertainty.augmented(lambda x: 2 * x, every)
    inside = (slice(None), slice(8, -8), slice(7, -7), slice(6, -6))
    for k in range(4):
        assert (model(x, key=k) - 2 * x)[inside].abs().max() < 1e-4
    changed, _ = every[1](x, 3)
    assert (changed - x)[inside].abs().max() > 0.05
    plane = uncertainty.affine(degrees=10, shift=1)
    one, undo = plane(x[:, :, :, 8], 5)
    assert (undo(one) - x[:, :, :, 8])[:, 6:-6, 6:-6].abs().max() < 1e-4
    coarse, undo = plane(x[:, :, :, 8], 5)  # an answer on a coarser grid of the same field
    pooled = functional.avg_pool2d(x[:, :, :, 8], 2)
    small = undo(functional.avg_pool2d(coarse, 2))
    assert (small - pooled)[:, 4:-4, 4:-4].abs().max() < 1e-4
    with pytest.raises(ValueError, match="affine: expected an image with two or three axes to turn"):
        plane(torch.ones(1, 5), 1)
    bright, _ = uncertainty.intensity(0.5, 0.1)(x, 3)
    assert not torch.equal(bright, x)
    found = uncertainty.monte_carlo(model, samples=3)(x, key=1)
    assert found.variance.max() > 0


def test_rates_put_in_are_labelled():
    module = eg.zoo.small_unet(2)
    model = uncertainty.dropout(module, rate={"bottom": 0.5})
    assert model.label == "dropout put in at bottom (0.5): not Bayesian"
    assert "rate={'bottom': 0.5}" in repr(model)
    assert not torch.equal(model(X, key=1), model(X, key=2))
    assert uncertainty.dropout(net()).label == "dropout of the network"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: uncertainty.dropout(eg.zoo.small_unet(2))(X, key=1),
            r"dropout: expected a network that calls dropout",
        ),
        (
            lambda: uncertainty.dropout(net(), rate={"botom": 0.1})(X, key=1),
            "names of modules in rate, got 'botom'",
        ),
        (lambda: uncertainty.dropout(net(), rate={"b": 1.0}), "a rate from 0 to below 1 at 'b'"),
        (lambda: uncertainty.dropout(net().train())(X, key=1), "evaluation mode"),
        (lambda: uncertainty.dropout(net())(X), "dropout: expected key="),
        (lambda: uncertainty.monte_carlo(eg.from_module(net())), "a random model"),
        (lambda: uncertainty.monte_carlo(uncertainty.dropout(net()), samples=1), "samples to be an int >= 2"),
        (lambda: uncertainty.monte_carlo(uncertainty.dropout(net()), link="sigmoud"), "Nearest: sigmoid"),
        (
            lambda: uncertainty.monte_carlo(lambda x, key: x, link="softmax")(X, key=1),
            "several channels for a softmax",
        ),
        (lambda: uncertainty.augmented(lambda x: x, []), "augmented: expected changes, at least one"),
        (lambda: uncertainty.flip(3), "a spatial axis 0, 1 or 2"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
