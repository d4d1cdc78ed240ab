"""What users get wrong is refused with a text that names the function, the expectation, what came, what to do."""

import re
import warnings

import jaxtyping
import pytest
import torch
from cases import make_case
from torch import nn

import esegeta as eg
from esegeta._registry import METHODS
from esegeta.conformance.subjects import built, subjects

NAN, INF = float("nan"), float("inf")
SUBJECTS = [s for s in subjects() if not s.composite]
PLAIN = [s for s in subjects() if s.composite and not METHODS[s.name.partition("(")[2].rstrip(")")].key]
TWO = torch.tensor([[1.0, 2.0]])
ZERO = torch.zeros(1, 2)


def square(z):
    return (z**2).sum()


@pytest.fixture(autouse=True)
def our_own_messages():
    """The run-time type checks of the tests would refuse wrong types before the library can."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def refused(kind, where, expected, got, advice=""):
    """The call raises ``kind`` with a message of the one shape that messages have; the parts are regexes."""
    return pytest.raises(
        kind, match=rf"(?s)^{where}: expected .*{expected}.*, got .*{got}.*\. .*{advice}.*\.$"
    )


def run(subject, score, x, refs=None, key=7):
    refs = defaults(subject, x) if refs is None else refs
    return subject.build(score)(x, *refs, **({"key": key} if subject.key else {}))


def defaults(subject, x):
    kinds = {"baseline": torch.zeros(1, 2), "baselines": torch.zeros(3, 1, 2)}
    return [kinds[k] for k in subject.refs]


every = pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
with_refs = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.refs], ids=repr)
evaluating = pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if METHODS[s.name].needs != "activation"], ids=repr
)
with_key = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.key], ids=repr)


# -- every method --------------------------------------------------------------------------------------------------


@evaluating
@pytest.mark.parametrize("score", [lambda z: z, lambda z: z.sum()[None], lambda z: 3.0, lambda z: None])
def test_a_score_is_one_number(subject, score):
    with refused((TypeError, ValueError), r"\w+", r"shape \(\)", ""):
        run(subject, score, TWO)


@every
@pytest.mark.parametrize("value", [None, 3, torch.ones(1), "unet"])
def test_a_score_is_a_function(subject, value):
    with refused(TypeError, subject.name, "a score: a function", "", "Compose a reducer"):
        subject.build(value)


@every
@pytest.mark.parametrize("value", [[1.0, 2.0], None, 3.0])
def test_the_input_is_a_tensor(subject, value):
    with refused(TypeError, subject.name, "x to be a torch.Tensor", type(value).__name__, "Convert"):
        run(subject, square, value)


@every
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_the_input_is_floating(subject, dtype):
    with refused(TypeError, subject.name, "x of a floating dtype", r"\(1, 2\)", r"x\.float\(\)"):
        run(subject, square, TWO.to(dtype))


@every
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_input_is_finite(subject, value):
    with refused(ValueError, subject.name, "finite values in x", "1 NaN or infinite of 2", "nan_to_num"):
        run(subject, square, torch.tensor([[1.0, value]]))


@every
def test_one_bad_example_of_a_batch_is_found(subject):
    xs = torch.stack([TWO, TWO, torch.tensor([[NAN, INF]])])
    refs = defaults(subject, TWO)
    explain = eg.batched(subject.build(square), in_dims=(0, *[None] * len(refs)))
    with refused(ValueError, subject.name, "finite values in x", "2 NaN or infinite"):
        explain(xs, *refs, **subject.extra())


@with_refs
@pytest.mark.parametrize("value", [NAN, INF])
def test_baselines_are_finite(subject, value):
    refs = defaults(subject, TWO)
    refs[0].view(-1)[0] = value
    with refused(ValueError, subject.name, f"finite values in {subject.refs[0]}", "1 NaN or infinite"):
        run(subject, square, TWO, refs)


@with_refs
def test_baselines_fit_the_input(subject):
    many = subject.refs == ("baselines",)
    what = "baselines of shape" if many else "baseline with the shape of the input"
    for shape in [(1, 3), (2,), (2, 1), (1, 1, 1, 2), (), (0, 1, 2)]:
        with refused(
            ValueError, subject.name, f"({what}|each of baselines)", r"float32\(", "(esegeta|torch)"
        ):
            run(subject, square, TWO, [torch.zeros(shape)])
    wrong = torch.zeros(3, 1, 2) if many else ZERO
    with refused(TypeError, subject.name, "with the dtype of the input", "float64", r"to\(x\.dtype\)"):
        run(subject, square, TWO, [wrong.double()])
    with refused(TypeError, subject.name, "with the dtype of the input", "int64"):
        run(subject, square, TWO, [wrong.long()])
    with refused(ValueError, subject.name, "on cpu", "a tensor on meta", r"to\(x\.device\)"):
        run(subject, square, TWO, [wrong.to("meta")])
    with refused(TypeError, subject.name, "to be a torch.Tensor", "float 0.0"):
        run(subject, square, TWO, [0.0])


@every
def test_the_number_of_tensors(subject):
    refs = defaults(subject, TWO)
    for given in ([*refs, ZERO], refs[:-1] if refs else [ZERO, ZERO]):
        with refused(
            TypeError, subject.name, r"explain\(x", f"{1 + len(given)} tensors", "esegeta.baselines"
        ):
            run(subject, square, TWO, given)


@with_key
def test_a_key_is_needed(subject):
    explain, refs = subject.build(square), defaults(subject, TWO)
    with refused(TypeError, subject.name, "key= ", "no key", "key=0"):
        explain(TWO, *refs)
    for bad in (1.0, "7", True, [1]):
        with refused(TypeError, subject.name, "key to be an int", type(bad).__name__, "key=0"):
            explain(TWO, *refs, key=bad)
    for bad in (torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)):
        with refused(TypeError, subject.name, "int64 tensor of shape", "", "esegeta.batched"):
            explain(TWO, *refs, key=bad)


COUNTS = [
    (s, name) for s in SUBJECTS for name in METHODS[s.name].example if name in ("steps", "samples", "most")
]


@pytest.mark.parametrize(("subject", "name"), COUNTS, ids=str)
@pytest.mark.parametrize("value", [0, -3, 2.5, 4.0, True, "8", None])
def test_numbers_of_steps_are_whole_and_positive(subject, name, value):
    with refused(ValueError, r"\w+", rf"{name} to be an int >= \d", re.escape(repr(value))):
        built(METHODS[subject.name], {name: value})(square)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: eg.smooth(eg.gradient(square), noise=v), "fraction"),
        (lambda v: eg.smooth_squared(eg.gradient(square), noise=v), "fraction"),
        (lambda v: eg.variance(eg.gradient(square), noise=v), "fraction"),
        (lambda v: eg.gradient_shap(square, noise=v), "fraction"),
        (lambda v: eg.noise.absolute(v), "sigma"),
        (lambda v: eg.noise_grad(lambda p: eg.gradient(square), {"w": ZERO}, noise=v), "noise"),
        (lambda v: eg.blur_integrated_gradients(square, sigma=v), "sigma"),
        (lambda v: eg.guided_integrated_gradients(square, distance=v), "distance"),
        (lambda v: eg.adaptive_integrated_gradients(square, tolerance=v), "tolerance"),
    ],
)
@pytest.mark.parametrize("value", [-0.1, NAN, INF])
def test_sizes_are_not_negative(make, name, value):
    with refused(ValueError, r"\w+", f"{name} to be a finite number >= 0", re.escape(repr(value))):
        make(value)


@pytest.mark.parametrize("value", ["loud", None, [0.1], True])
def test_noise_is_a_number_or_a_function(value):
    with refused((TypeError, ValueError), r"\w+", "a number", "", ""):
        eg.smooth(eg.gradient(square), noise=value)


@pytest.mark.parametrize("make", [eg.smooth, eg.smooth_squared, eg.variance])
@pytest.mark.parametrize("value", [0, -1, 2.0])
def test_numbers_of_samples(make, value):
    with refused(ValueError, make.__name__, "samples to be an int >= 1", re.escape(repr(value))):
        make(eg.gradient(square), samples=value)


def test_quadrature_rules():
    with refused(ValueError, "quadrature", "rule to be one of gauss-legendre, midpoint", "'simpson'"):
        eg.integrated_gradients(square, rule="simpson")
    with refused(ValueError, "quadrature", "steps to be an int >= 2", "1"):
        eg.integrated_gradients(square, rule="trapezoid", steps=1)
    with refused(ValueError, "quadrature", "at most 4096 steps of gauss-legendre", "1000000000"):
        eg.integrated_gradients(square, steps=10**9)
    with refused(ValueError, "guided_integrated_gradients", "0 < fraction <= 1", "0"):
        eg.guided_integrated_gradients(square, fraction=0)
    with refused(ValueError, "reduce_channels", "by to be one of sum, mean", "'median'"):
        eg.reduce_channels(eg.gradient(square), by="median")


@every
def test_statics_have_to_be_named(subject):
    with pytest.raises(TypeError, match="positional argument"):
        METHODS[subject.name].fn(square, *["copy"] * METHODS[subject.name].place, 3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        built(METHODS[subject.name], {"stpes": 3})(square)


def test_a_name_that_is_almost_right():
    with refused(
        ValueError, "find_method", "the name of a method", "'integrated_gradient'", "integrated_gradients"
    ):
        eg.find_method("integrated_gradient")


# -- scores without a gradient -------------------------------------------------------------------------------------

differentiating = pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if METHODS[s.name].needs == "gradient"], ids=repr
)


def logits(x):
    return torch.stack([-x[0], x[0]])


@differentiating
def test_a_count_is_refused_at_once(subject):
    score = eg.reducers.predicted_count(logits, 1)
    with refused(
        ValueError, subject.name, "a differentiable score", "predicted_count.*identically zero", "soft_count"
    ):
        subject.build(score)


@differentiating
@pytest.mark.parametrize(
    "score", [lambda z: square(z).detach(), lambda z: (z > 1).float().sum(), lambda z: torch.ones(())]
)
def test_a_score_that_is_cut_off_is_refused(subject, score):
    with refused(ValueError, "gradient", "differentiable operations", "identically zero", "soft_count"):
        run(subject, score, TWO)


def otsu_count(z):
    """Sums z / z over the voxels above a threshold: a count whose gradient exists and is exactly zero."""
    kept = z * (z > 0.5)
    return (kept / torch.where(kept == 0, 1.0, kept)).sum()


# What a rule sends back is no gradient: where that is zero, it need not be.
by_gradients = pytest.mark.parametrize(
    "subject",
    [s for s in SUBJECTS if METHODS[s.name].needs == "gradient" and METHODS[s.name].differentiable],
    ids=repr,
)

# A method that integrates to a tolerance warns that it cannot before it gets to see that nothing can.
patient = pytest.mark.filterwarnings("ignore::esegeta.ExecutionWarning")


def hasty(subject, score):
    """The method with few steps of everything."""
    few = {k: min(v, 8) if isinstance(v, int) else v for k, v in METHODS[subject.name].example.items()}
    return built(METHODS[subject.name], few)(score)


@patient
@by_gradients
def test_a_count_that_looks_differentiable_is_refused(subject):
    refs = defaults(subject, TWO)
    with refused(
        ValueError,
        subject.name,
        "a score with a gradient",
        "varies although its gradient is zero",
        "soft_count",
    ):
        hasty(subject, otsu_count)(TWO, *refs, **subject.extra())


@patient
@by_gradients
def test_a_count_is_refused_in_a_batch_too(subject):
    refs = defaults(subject, TWO)
    explain = eg.batched(hasty(subject, otsu_count), in_dims=(0, *[None] * len(refs)))
    with refused(ValueError, subject.name, "a score with a gradient", "otsu_count"):
        explain(torch.stack([TWO, 2 * TWO]), *refs, **subject.extra())


@differentiating
def test_a_saturated_score_is_not_refused(subject):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a = run(subject, lambda z: z.clamp(max=1).sum(), torch.full((1, 2), 2.0))
    assert torch.isfinite(a).all()
    local = eg.gradient(lambda z: z.clamp(max=1).sum())(torch.full((1, 2), 2.0))
    assert torch.equal(local, ZERO)


@evaluating
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_score_is_finite(subject, value):
    with refused(ValueError, r"\w+", "finite", ""):
        run(subject, lambda z: square(z) * value, TWO)


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.name in ("gradient", "saliency")], ids=repr)
def test_a_steep_score_that_is_saturated_is_not_refused(subject):
    steep = lambda z: (100 * z).clamp(-1, 1).sum()
    assert torch.equal(run(subject, steep, torch.full((1, 2), 2.0)), ZERO)


def test_an_input_has_elements():
    with refused(ValueError, "gradient", "", "", ""):
        eg.gradient(square)(TWO[:, :0])


def test_a_share_is_a_number():
    with refused(
        (TypeError, ValueError), "guided_integrated_gradients", "fraction to be a finite number >= 0", "'a'"
    ):
        eg.guided_integrated_gradients(square, fraction="a")


# -- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", PLAIN, ids=repr)
def test_transforms_refuse_what_methods_refuse(subject):
    explain, refs = subject.build(square), defaults(subject, TWO)
    with refused(ValueError, r"\w+", "finite values in x", "1 NaN or infinite"):
        explain(torch.tensor([[1.0, NAN]]), *refs, **subject.extra())
    with refused(TypeError, r"\w+", "x of a floating dtype", "int64"):
        explain(TWO.long(), *refs, **subject.extra())
    if subject.key:
        with refused(TypeError, subject.name.partition("(")[0], "key= ", "no key"):
            explain(TWO, *refs)


def test_over_baselines_takes_a_stack():
    explain = eg.over_baselines(eg.integrated_gradients(square))
    with refused(ValueError, "over_baselines", "baselines of shape", r"float32\(1, 2\)", "torch.stack"):
        explain(TWO, ZERO)
    with refused(ValueError, "integrated_gradients", "finite values in baseline", "1 NaN"):
        explain(TWO, torch.tensor([[[0.0, 0.0]], [[NAN, 0.0]]]))
    with refused(TypeError, "over_baselines", "baselines to be a torch.Tensor", "NoneType"):
        explain(TWO, None)


def test_weight_noise_needs_parameters():
    with refused(ValueError, "noise_grad", "parameters to disturb", "none", "parametrised"):
        eg.noise_grad(lambda p: eg.gradient(square), {})
    with refused(TypeError, "noise_grad", "key= ", "no key"):
        eg.noise_grad(lambda p: eg.gradient(square), {"w": ZERO})(TWO)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_batches():
    ig = eg.integrated_gradients(square, steps=2)
    xs = torch.ones(3, 1, 2)
    with refused(ValueError, "batched", "one entry per example", r"\[3, 2\] entries", "None in in_dims"):
        eg.batched(ig)(xs, torch.zeros(2, 1, 2))
    with refused(ValueError, "batched", "one entry per example", r"\[0, 0\] entries"):
        eg.batched(ig)(xs[:0], xs[:0])
    for dims in ((0,), (0, None, None), (None, 0)):
        with refused(
            ValueError, "batched", "in_dims for 2 tensors, the first one mapped", re.escape(repr(dims))
        ):
            eg.batched(ig, in_dims=dims)(xs, xs)
    with refused(ValueError, "batched", "in_dims", "None"):
        eg.batched(ig, in_dims=None)(xs, xs)
    with refused(TypeError, "batched", "xs to be a torch.Tensor", "list"):
        eg.batched(ig)([xs], xs)
    with refused(TypeError, "batched", "argument 2 to be a torch.Tensor", "NoneType"):
        eg.batched(ig)(xs, None)
    shap = eg.gradient_shap(square, samples=2)
    with refused(ValueError, "batched", "one entry per example", r"\[3, 2\] entries"):
        eg.batched(shap, in_dims=(0, None))(xs, xs, key=torch.tensor([1, 2]))
    with refused(
        ValueError, "integrated_gradients", "baseline with the shape", r"\(3, 1, 2\)", "esegeta.batched"
    ):
        ig(xs[0], xs)


def test_axes_to_map_over_exist():
    ig = eg.integrated_gradients(square, steps=2)
    with refused(ValueError, "batched", "in_dims", "5"):
        eg.batched(ig, in_dims=5)(torch.ones(3, 1, 2), torch.ones(3, 1, 2))


# -- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.BatchNorm1d(2), "BatchNorm1d"), (nn.Dropout(0.5), "Dropout"), (nn.Dropout1d(), "Dropout1d")],
)
def test_training_mode_is_refused(layer, name):
    net = nn.Sequential(nn.Conv1d(1, 2, 1), layer)
    x = torch.ones(1, 4)
    with refused(
        ValueError,
        "Sequential",
        "a network in evaluation mode",
        f"training mode with {name}",
        r"module\.eval\(\)",
    ):
        eg.gradient(lambda z: eg.from_module(net)(z).sum())(x)
    assert net.training
    net.eval()
    eg.gradient(lambda z: eg.from_module(net)(z).sum())(x)


def test_training_mode_without_consequences_is_not_refused():
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.GroupNorm(1, 2), nn.Dropout(0.0), nn.InstanceNorm1d(2))
    eg.gradient(lambda z: eg.from_module(net)(z).square().sum())(torch.randn(1, 4))
    assert net.training


class Two(nn.Module):
    def forward(self, x):
        return {"logits": x, "features": [x, 2 * x]}


def test_outputs_have_to_be_chosen():
    x = torch.ones(1, 4)
    with refused(
        TypeError, "Two", "one tensor as output", "a dict with 'logits': .*'features'", "output='name'"
    ):
        eg.from_module(Two())(x)
    with refused(ValueError, "Two", "an output at 'logit'", "a dict with 'logits'", "output="):
        eg.from_module(Two(), "logit")(x)
    with refused(ValueError, "Two", r"an output at \('features', 2\)", "a list of", "output="):
        eg.from_module(Two(), ("features", 2))(x)
    assert eg.from_module(Two(), ("features", 1))(x).sum() == 8
    assert eg.from_module(Two(), lambda y: y["logits"])(x).sum() == 4


def test_dtypes_of_networks():
    net = nn.Conv1d(1, 2, 1)
    with refused(
        TypeError,
        "Conv1d",
        r"an input of the network's dtype torch\.float32",
        "float64",
        r"x\.to\(torch\.float32\)",
    ):
        eg.from_module(net)(torch.ones(1, 4, dtype=torch.float64))
    with refused(TypeError, "Conv1d", "network's dtype", "float64"):
        eg.gradient(lambda z: eg.from_module(net)(z).sum())(torch.ones(1, 4, dtype=torch.float64))
    with refused(ValueError, "Conv1d", "an input on the network's device cpu", "one on meta"):
        eg.from_module(net)(torch.ones(1, 4, device="meta"))


def test_networks_map_batches_to_batches():
    with refused(ValueError, r"\w+|<lambda>", "first axis is the batch of 1", r"float32\(\)", "from_module"):
        eg.from_module(lambda x: x.sum())(torch.ones(1, 4))
    with refused(TypeError, "from_module", "a module or another callable", "int 3"):
        eg.from_module(3)
    with refused(TypeError, "Identity", "at least one tensor", "int 3"):
        eg.from_module(nn.Identity())(3)
    with refused(TypeError, "parametrised", r"an nn\.Module", "function"):
        eg.models.parametrised(lambda x: x)


def test_a_module_is_not_a_score():
    case = make_case("segmentation", axes=2, channels=1)
    with refused(ValueError, "gradient", r"a value of shape \(\)", r"\(2, 3, 4\)", "reducer"):
        eg.gradient(eg.from_module(case.module))(case.x)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        *[({"chunk": v}, "chunk to be an int >= 1") for v in (0, -1, 2.0, "2", True)],
        *[
            ({"memory": v}, 'memory in bytes or as "4 GiB"')
            for v in (0, -5, "4 gigs", "GiB", "-1 GiB", NAN, INF, True, "")
        ],
        *[({"layout": v}, "layout to be one of auto, channels_last, contiguous") for v in ("nchw", 3)],
        *[
            ({"precision": v}, "precision to be one of bfloat16, float16")
            for v in ("int8", torch.bfloat16, 16)
        ],
        *[({"progress": v}, "progress to be a bool or a function") for v in ("yes", 1)],
        *[({"deadline": v}, "deadline to be a finite number >= 0") for v in (-1, NAN, INF, "soon")],
    ],
    ids=str,
)
def test_settings(settings, expected):
    with refused((TypeError, ValueError), "execution", re.escape(expected), ""), eg.execution(**settings):
        pass


def test_settings_are_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), eg.execution(chunk=3):
        raise ZeroDivisionError
    from esegeta.engine.execution import current

    assert current().chunk is None


def test_trees():
    explain = eg.on_trees(eg.integrated_gradients)(lambda t: t["a"].sum() * t["b"].sum())
    tree = {"a": torch.ones(2), "b": torch.ones(3)}
    with refused(ValueError, "on_trees", "a tree like the input", "", "Match keys and shapes"):
        explain(tree, {"a": torch.ones(2)})
    with refused(TypeError, "on_trees", "tensors of one dtype", "float64"):
        explain({"a": torch.ones(2), "b": torch.ones(3).double()}, tree)
    with refused(TypeError, "on_trees", "leaf 1 of a floating dtype", "int64"):
        explain({"a": torch.ones(2), "b": torch.ones(3).long()}, tree)


def test_the_report_of_integrated_gradients_checks_its_input_too():
    run = eg.integrated(square)
    with refused(ValueError, "adaptive_integrated_gradients", "baseline with the shape", r"\(1, 1\)", ""):
        run(TWO, TWO[:, :1])
    with refused(ValueError, "adaptive_integrated_gradients", "finite values in x", "1 NaN", ""):
        run(TWO * torch.tensor([[NAN, 1.0]]), TWO)
