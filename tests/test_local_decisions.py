"""What deciding about local evaluation costs, that it is decided once, and that writes in place are followed."""

import gc
import weakref

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta import features
from esegeta.engine import layout, local, windows
from esegeta.engine.windows import TooWide, Window


class Block(nn.Module):
    """Convolution, norm, dropout that does nothing in evaluation mode, activation in place: the usual order."""

    def __init__(self, a, b, norm, axes=3, stride=1):
        super().__init__()
        conv, drop = getattr(nn, f"Conv{axes}d"), getattr(nn, f"Dropout{axes}d")
        self.conv = conv(a, b, 3, stride, padding=1)
        self.norm = getattr(nn, f"{norm}Norm{axes}d")(b, affine=True)
        self.drop, self.act = drop(0.3), nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x):
        return self.act(self.drop(self.norm(self.conv(x))))


class Net(nn.Module):
    """Two levels of blocks with a skip."""

    def __init__(self, norm, axes=3, width=8):
        super().__init__()
        self.first, self.down = Block(1, width, norm, axes), Block(width, 2 * width, norm, axes, 2)
        self.up = getattr(nn, f"ConvTranspose{axes}d")(2 * width, width, 2, 2)
        self.last, self.head = Block(2 * width, width, norm, axes), getattr(nn, f"Conv{axes}d")(width, 2, 1)

    def forward(self, x):
        skip = self.first(x)
        return self.head(self.last(torch.cat([self.up(self.down(skip)), skip], 1)))


def dynunet():
    nets = pytest.importorskip("monai.networks.nets")
    sizes = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    return nets.DynUNet(3, 1, 2, **sizes, filters=(4, 8, 16), norm_name="INSTANCE", dropout=0.1)


class Opaque(nn.Module):
    """What dispatch cannot see into, and what is global."""

    def forward(self, x):
        y = torch.from_numpy(x.detach().numpy().copy())
        return torch.stack([y[:, 0], y[:, 0] - y.mean((1, *range(2, y.ndim)), keepdim=True)[:, 0]], 1)


def counting(net):
    """A list of the work that was done in a network, a convolution after the other; of others their outputs."""
    seen = []

    def note(module, _, y):
        each = module.weight[0].numel() if "Conv" in type(module).__name__ else 1
        if not isinstance(y, Window):
            seen.append(y.numel() * each)
        elif not y.run.counting:  # windows of real values: the clean image where it records, and the patches
            seen.append((y.patch.numel() + (y.numel() if y.run.recording else 0)) * each)

    for module in [
        m for m in net.modules() if getattr(m, "weight", None) is not None and "Conv" in type(m).__name__
    ] or [net]:
        module.register_forward_hook(note)
    return seen


def work(net, way, explain, *arguments, **more):
    seen = counting(net)
    with eg.execution(evaluation=way) as run:
        explain(*arguments, **more)
    for module in net.modules():
        module._forward_hooks.clear()
    return sum(seen), [e for e in run.events if e["event"] == "evaluation"]


def score_of(net):
    return eg.reducers.class_sum(eg.from_module(net.eval()), 1)


@pytest.mark.parametrize(
    ("make", "shape", "size"),
    [
        (lambda: Net("Instance"), (24, 24, 24), 12),
        (lambda: Net("Instance", 2, 16), (64, 64), 8),
        (dynunet, (24, 24, 24), 12),
        (Opaque, (24, 24, 24), 12),
        (Opaque, (64, 64), 8),
    ],
    ids=["few changes", "many", "DynUNet", "opaque, few", "opaque, many"],
)
def test_deciding_takes_a_tenth_at_most_and_is_done_once(make, shape, size):
    torch.manual_seed(0)
    net = make()
    x = eg.random.normal(0, (1, *shape))
    score = score_of(net)
    score(x)  # whether a batch may go through together is found out once, whatever the evaluation
    explain = eg.occlusion(score, size=size)
    with eg.execution(evaluation="whole"):
        explain(x, 0 * x)
    whole, _ = work(net, "whole", explain, x, 0 * x)
    first, events = work(net, "auto", explain, x, 0 * x)
    again, _ = work(net, "auto", explain, x + 1, 0 * x)
    assert events[0]["evaluation"] == "whole"
    assert first <= 1.1 * whole
    assert again == whole
    # A score made anew of the same model pays no more than the first.
    other = eg.occlusion(eg.reducers.class_sum(eg.from_module(net), 0), size=size)
    with eg.execution(evaluation="whole"):
        other(x, 0 * x)
    assert work(net, "auto", other, x, 0 * x)[0] <= 1.1 * whole


def test_walks_are_decided_before_they_cost():
    torch.manual_seed(0)
    net = Net("Instance")
    x = eg.random.normal(0, (1, 24, 24, 24))
    score = score_of(net)
    score(x)
    explain = eg.shapley_sampling(score, features=features.grid(12), samples=2)
    whole, _ = work(net, "whole", explain, x, 0 * x, key=1)
    first, events = work(net, "auto", explain, x, 0 * x, key=1)
    assert first <= 1.1 * whole
    assert "native_batch_norm" in events[0]["why"]


def test_few_changes_of_a_local_network_that_pay_are_followed():
    torch.manual_seed(0)
    score = score_of(Net("Batch"))
    x = eg.random.normal(0, (1, 32, 32, 32))
    inside = torch.zeros(32, 32, 32, dtype=torch.bool)
    inside[:8, :16, :16] = True
    parts = features.within(features.grid(4), inside)
    explain = eg.feature_ablation(score, features=parts)
    with eg.execution() as seen:
        here = explain(x, 0 * x)
    assert [e["evaluation"] for e in seen.events] == ["windows"]
    with eg.execution(evaluation="whole"):
        whole = explain(x, 0 * x)
    assert (here - whole).abs().max() <= 1e-5 * score(x).abs()


@pytest.mark.parametrize("norm", ["Batch", "Instance"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_what_is_foreseen_is_what_it_costs(norm, axes):
    score = score_of(Net(norm, axes))
    x = eg.random.normal(0, (1, *[24] * axes))
    box = (slice(0, 1), *[slice(8, 12)] * axes)
    real = local.Followed(score, x)
    share = local._trace(real, x, box)
    counted = local.Followed(score, x.to("meta"))
    counted.run.counting = x.device
    assert local._trace(counted, x.to("meta"), box) == pytest.approx(share, rel=0.05)
    assert counted.run.names == real.run.names
    assert counted.run.global_ops == real.run.global_ops


@pytest.mark.parametrize(("size", "local_pays"), [(64, False), (96, True), (128, True)])
def test_a_curve_part_by_part_is_local_where_that_takes_less_time(size, local_pays):
    """By processor time of one core local takes 0.9 of whole at 64 voxels a side, 0.4 at 96 and 0.11 at 128.

    Most of it is the last convolution, whose eight channels take as long as sixteen, and changes that are written
    into the activations; at 32 and 64 what operators take to be called and moved is more than what is saved.
    """
    model = eg.from_module(eg.zoo.brain_extraction_unet())
    score = eg.reducers.class_sum(model, 0)
    x, middle = torch.zeros(1, size, size, size), size // 2
    box = (slice(0, 1), *[slice(middle - 8, middle)] * 3)
    if local_pays:
        assert local._foreseen(score, x, [box], 64, walks=1)
    else:
        with pytest.raises(TooWide, match="64 changes that each reach"):
            local._foreseen(score, x, [box], 64, walks=1)


@pytest.mark.parametrize("norm", ["Batch", "Instance"])
def test_what_stays_and_what_operators_take_to_be_called_counts(norm):
    score = score_of(Net(norm))
    x = eg.random.normal(0, (1, 24, 24, 24))
    box = (slice(0, 1), *[slice(8, 12)] * 3)
    follow = local.Followed(score, x)
    goes = local._trace(follow, x, box)
    stays = local._trace(follow, x, box, walks=1)
    assert stays > goes
    run = follow.run
    calls = len(run.names) * windows.CALLING / run.whole
    assert run.share(1, at_once=1) - run.share(1, at_once=4) == pytest.approx(0.75 * calls)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", [([1] * 3, [0] * 3, [1] * 3), ([2, 1, 1], [1, 0, 2], [1, 2, 1])])
def test_a_window_alone_is_convolved_alone(groups, how):
    """A network is given a pair of small volumes, as one alone takes a slow kernel; a window has no need of it."""
    x = layout.channels_last(torch.randn(1, 4, 9, 10, 11, generator=torch.Generator().manual_seed(0)))
    w = torch.randn(6, 4 // groups, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    sizes = []

    def convolution(batch, *rest):
        sizes.append(len(batch))
        return torch.ops.aten.convolution(batch, *rest)

    for bias in (None, torch.arange(6.0)):
        rest = (w, bias, *how, False, [0] * 3, groups)
        found = windows.convolved(convolution, x, *rest)
        expected = torch.ops.aten.convolution(
            x.double(), w.double(), None if bias is None else bias.double(), *rest[2:]
        )
        assert (found - expected).abs().max() < 1e-4
    assert set(sizes) <= {1}


def test_a_score_that_is_gone_leaves_nothing_behind():
    net = Net("Instance", 2)
    score = score_of(net)
    x = eg.random.normal(0, (1, 96, 96))
    eg.occlusion(score, size=48)(x, 0 * x)
    gone = weakref.ref(score), weakref.ref(net)
    before = len(local._decided)
    del score, net
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None
    assert len(local._decided) < before


def test_how_far_a_network_sees_is_asked_once_also_if_it_sees_everything():
    net = nn.InstanceNorm2d(1).eval()
    model, seen = eg.from_module(net), counting(net)
    x = eg.random.normal(0, (1, 40, 40))
    for _ in range(2):
        before = len(seen)
        with pytest.raises(ValueError, match="is global along axis 1"):
            eg.locality(model, x)
    assert len(seen) - before <= 1  # to see which model it is
    assert sum(seen) < 200 * x.numel()


# --- Writes in place --------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, run, width=8):
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(width), nn.Dropout(0.5)
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.run(self, x))


relu_ = nn.functional.relu_


def behind_dropout(net, x):
    return relu_(net.drop(net.norm(net.conv(x))))


def skip_that_is_written(net, x):
    h = net.conv(x)
    return relu_(net.drop(h)) + 2 * h  # h is written too: dropout gives back what it was given


def alias_that_is_written(net, x):
    h = net.conv(x)
    relu_(h.detach())
    return h * 3


def base_never_read_again(net, x):
    h = net.conv(x)
    return relu_(h.view(*h.shape[:2], -1)).view(h.shape) * 2


def base_read_again(net, x):
    h = net.conv(x)
    relu_(h.unsqueeze(0))
    return h * 3


def part_read_again(net, x):
    h = net.conv(x)
    h[:, :2].mul_(5)
    return h + 1


@pytest.mark.parametrize(
    ("run", "way"),
    [
        (behind_dropout, "windows"),
        (skip_that_is_written, "windows"),
        (alias_that_is_written, "windows"),
        (base_never_read_again, "windows"),
        (base_read_again, None),
        (part_read_again, None),
    ],
)
def test_writes_in_place_are_followed_or_refused(run, way):
    torch.manual_seed(1)
    score = score_of(Function(run).double())
    x = eg.random.normal(2, (1, 24, 24), dtype=torch.float64)
    explain = eg.occlusion(score, size=7, stride=7)
    with eg.execution(evaluation="whole"):
        whole = explain(x, 0 * x)
    if way is None:
        with (
            eg.execution(evaluation="windows"),
            pytest.raises(ValueError, match="a tensor takes part of which a view was written into"),
        ):
            explain(x, 0 * x)
    with eg.execution(evaluation=way or "auto"):
        here = explain(x, 0 * x)
    assert (here - whole).abs().max() <= 1e-10 * whole.abs().max()
