"""What users get wrong is refused with a text that names the function, the expectation, what came, what to do."""

import contextlib
import functools
import inspect
import re
import warnings

import jaxtyping
import pytest
import torch
from cases import make_case
from refusing import refused
from torch import nn

import esegeta as eg
from esegeta._registry import METHODS, REDUCERS, TRANSFORMS
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


def run(subject, score, x, refs=None, key=7):
    refs = defaults(subject, x) if refs is None else refs
    return subject.build(score)(x, *refs, **({"key": key} if subject.key else {}))


def defaults(subject, x):
    kinds = {"baseline": torch.zeros(1, 2), "baselines": torch.zeros(3, 1, 2)}
    return [kinds[k] for k in subject.refs]


CHECKS = []


def tried(applies):
    """Decorators that let a check be tried on every method it applies to, with each of some values."""

    def with_values(*values):
        def add(check):
            CHECKS.append((check, applies, values))
            return check

        return add

    return with_values


every = tried(lambda subject: True)
with_refs = tried(lambda subject: subject.refs)
with_key = tried(lambda subject: subject.key)
without_key = tried(lambda subject: not subject.key)
evaluating = tried(lambda subject: METHODS[subject.name].needs != "activation")
differentiating = tried(lambda subject: METHODS[subject.name].needs == "gradient")
# What a rule sends back is no gradient: where that is zero, it need not be.
by_gradients = tried(
    lambda subject: METHODS[subject.name].needs == "gradient" and METHODS[subject.name].differentiable
)


@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_what_a_method_refuses(subject):
    """All checks below, one after another: the traceback of a failure names the check and the value."""
    for check, applies, values in CHECKS:
        if applies(subject):
            for given in [(value,) for value in values] or [()]:
                check(subject, *given)


# -- every method --------------------------------------------------------------------------------------------------


@evaluating(lambda z: z, lambda z: z.sum()[None], lambda z: 3.0, lambda z: None)
def a_score_is_one_number(subject, score):
    with refused((TypeError, ValueError), r"\w+", r"shape \(\)", ""):
        run(subject, score, TWO)


@every(None, 3, [square], "unet")
def a_score_is_a_function(subject, value):
    with refused(TypeError, subject.name, "a score: a function", "", "Compose a reducer"):
        subject.build(value)


@every([1.0, 2.0], None, 3.0)
def the_input_is_a_tensor(subject, value):
    with refused(TypeError, subject.name, "x to be a torch.Tensor", type(value).__name__, "Convert"):
        run(subject, square, value)


@every(torch.int64, torch.uint8, torch.bool)
def the_input_is_floating(subject, dtype):
    with refused(TypeError, subject.name, "x of a floating dtype", r"\(1, 2\)", r"x\.float\(\)"):
        run(subject, square, TWO.to(dtype))


@every(NAN, INF, -INF)
def the_input_is_finite(subject, value):
    with refused(ValueError, subject.name, "finite values in x", "1 NaN or infinite of 2", "nan_to_num"):
        run(subject, square, torch.tensor([[1.0, value]]))


@every()
def one_bad_example_of_a_batch_is_found(subject):
    xs = torch.stack([TWO, TWO, torch.tensor([[NAN, INF]])])
    refs = defaults(subject, TWO)
    explain = eg.batched(subject.build(square), in_dims=(0, *[None] * len(refs)))
    with refused(ValueError, subject.name, "finite values in x", "2 NaN or infinite"):
        explain(xs, *refs, **subject.extra())


@with_refs(NAN, INF)
def baselines_are_finite(subject, value):
    refs = defaults(subject, TWO)
    refs[0].view(-1)[0] = value
    with refused(ValueError, subject.name, f"finite values in {subject.refs[0]}", "1 NaN or infinite"):
        run(subject, square, TWO, refs)


@with_refs()
def baselines_fit_the_input(subject):
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


@every()
def the_number_of_tensors(subject):
    refs = defaults(subject, TWO)
    for given in ([*refs, ZERO], refs[:-1] if refs else [ZERO, ZERO]):
        with refused(
            TypeError, subject.name, r"explain\(x", f"{1 + len(given)} tensors", "esegeta.baselines"
        ):
            run(subject, square, TWO, given)


@with_key()
def a_key_is_needed(subject):
    explain, refs = subject.build(square), defaults(subject, TWO)
    with refused(TypeError, subject.name, "key= ", "no key", "key=0"):
        explain(TWO, *refs)
    for bad in (1.0, "7", True, [1]):
        with refused(TypeError, subject.name, "key to be an int", type(bad).__name__, "key=0"):
            explain(TWO, *refs, key=bad)
    for bad in (torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)):
        with refused(TypeError, subject.name, "int64 tensor of shape", "", "esegeta.batched"):
            explain(TWO, *refs, key=bad)


@every(0, -3, 2.5, 4.0, True, "8", None, 10**30)
def numbers_of_steps_are_whole_and_positive(subject, value):
    for name in {"steps", "samples", "max_runs"} & set(METHODS[subject.name].example):
        with refused(ValueError, subject.name, rf"{name} to be an int >= \d", re.escape(repr(value))):
            built(METHODS[subject.name], {name: value})(square)


@every(nn.Conv1d(1, 1, 1), nn.Sequential(nn.Dropout()), nn.Conv1d(1, 1, 1).forward, nn.Identity().eval())
def a_network_is_not_a_score(subject, module):
    place, advice = ["copy"] * METHODS[subject.name].place, r"esegeta\.from_module\(module\.eval"
    for network in (module, functools.partial(module)):
        with refused(TypeError, subject.name, "a score", "an nn.Module", advice):
            METHODS[subject.name].fn(network, *place, **METHODS[subject.name].example)


@every()
def an_image_goes_into_what_comes_out(subject):
    place = ["copy"] * METHODS[subject.name].place
    with refused(
        TypeError, subject.name, "positional argument", r"float32\(1, 2\)", r"what comes out: .*\)\(x"
    ):
        METHODS[subject.name].fn(square, *place, TWO)
    with refused(TypeError, subject.name, "a score", r"float32\(1, 2\)", r"\(score\)\(x\)"):
        METHODS[subject.name].fn(TWO, *place)


@every()
def tensors_have_names(subject):
    explain, refs = subject.build(square), defaults(subject, TWO)
    names = ["x", *subject.refs, *["key"] * subject.key]
    assert list(inspect.signature(explain).parameters) == names
    assert all(f"    {name}: " in explain.__doc__ for name in names)
    settings = METHODS[subject.name].example
    assert all(name in explain.__doc__.partition("\n")[0] for name in [subject.name, *settings])
    by_name = explain(TWO, **dict(zip(subject.refs, refs, strict=True)), **subject.extra())
    by_place = explain(TWO, *refs, **subject.extra())
    assert torch.equal(by_name, by_place)
    with refused(TypeError, subject.name, r"explain\(x", "the keyword 'basline'", ""):
        explain(TWO, *refs[1:], basline=ZERO)
    if refs:
        with refused(TypeError, subject.name, r"explain\(x", f"{subject.refs[0]} twice", "once"):
            explain(TWO, *refs, **{subject.refs[0]: refs[0]}, **subject.extra())


@without_key()
def a_key_that_nothing_is_drawn_from(subject):
    with refused(TypeError, subject.name, r"explain\(x", "key=int 3", "leave the key out"):
        subject.build(square)(TWO, *defaults(subject, TWO), key=3)


@tried(lambda subject: subject.refs == ("baseline",))()
def a_list_for_one_baseline(subject):
    with refused(TypeError, subject.name, "baseline to be a torch.Tensor", "a list of 2", "torch.stack"):
        run(subject, square, TWO, [[ZERO, ZERO]])


@tried(lambda subject: subject.refs == ("baselines",))()
def a_list_of_baselines(subject):
    with refused(TypeError, subject.name, "baselines to be a torch.Tensor", "a list of 2", r"torch\.stack\("):
        run(subject, square, TWO, [[ZERO, ZERO]])


@tried(lambda subject: METHODS[subject.name].place)()
def places_are_asked_for_by_the_method(subject):
    method, settings = METHODS[subject.name].fn, METHODS[subject.name].example
    for place in (3, "", "a#b#c", [], None):
        with refused((TypeError, ValueError), subject.name, "a place", "", ""):
            method(square, place, **settings)
    with refused(TypeError, subject.name, "a place of the score", "none", "esegeta.places"):
        method(square, **settings)
    rewritten = lambda z: eg.mark(torch.relu(z), "copy").sum()
    with refused(ValueError, subject.name, "a place of this score", "'coyp'", ""):
        method(rewritten, "coyp", **settings)(TWO, *defaults(subject, TWO), **subject.extra())


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
def test_sizes_are_not_negative(make, name):
    for value in (-0.1, NAN, INF, 10**30):
        with refused(ValueError, r"\w+", f"{name} to be a finite number >= 0", re.escape(repr(value))):
            make(value)


def test_noise_is_a_number_or_a_function():
    for value in ("loud", None, [0.1], True):
        with refused((TypeError, ValueError), r"\w+", "a number", "", ""):
            eg.smooth(eg.gradient(square), noise=value)


@pytest.mark.parametrize("make", [eg.smooth, eg.smooth_squared, eg.variance])
def test_numbers_of_samples(make):
    for value in (0, -1, 2.0):
        with refused(ValueError, make.__name__, "samples to be an int >= 1", re.escape(repr(value))):
            make(eg.gradient(square), samples=value)


def test_quadrature_rules():
    with refused(
        ValueError, "integrated_gradients", "rule to be one of gauss-legendre, midpoint", "'simpson'"
    ):
        eg.integrated_gradients(square, rule="simpson")
    with refused(ValueError, "integrated_gradients", "steps to be an int >= 2", "1"):
        eg.integrated_gradients(square, rule="trapezoid", steps=1)
    with refused(ValueError, "integrated_gradients", "at most 4096 steps of gauss-legendre", "1000000000"):
        eg.integrated_gradients(square, steps=10**9)
    with refused(ValueError, "guided_integrated_gradients", "0 < fraction <= 1", "0"):
        eg.guided_integrated_gradients(square, fraction=0)
    with refused(ValueError, "reduce_channels", "by to be one of sum, mean", "'median'"):
        eg.reduce_channels(eg.gradient(square), by="median")


@every()
def statics_have_to_be_named(subject):
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


def logits(x):
    return torch.stack([-x[0], x[0]])


@differentiating()
def a_count_is_refused_at_once(subject):
    score = eg.reducers.predicted_count(logits, 1)
    with refused(
        ValueError, subject.name, "a differentiable score", "predicted_count.*identically zero", "soft_count"
    ):
        subject.build(score)


@differentiating(lambda z: square(z).detach(), lambda z: (z > 1).float().sum(), lambda z: torch.ones(()))
def a_score_that_is_cut_off_is_refused(subject, score):
    with refused(ValueError, subject.name, "differentiable operations", "identically zero", "soft_count"):
        run(subject, score, TWO)


def otsu_count(z):
    """Sums z / z over the voxels above a threshold: a count whose gradient exists and is exactly zero."""
    kept = z * (z > 0.5)
    return (kept / torch.where(kept == 0, 1.0, kept)).sum()


@contextlib.contextmanager
def patient():
    """A method that integrates to a tolerance warns that it cannot before it gets to see that nothing can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eg.ExecutionWarning)
        yield


def fast(subject, score):
    """The method with few steps of everything."""
    few = {k: min(v, 8) if isinstance(v, int) else v for k, v in METHODS[subject.name].example.items()}
    return built(METHODS[subject.name], few)(score)


@by_gradients()
def a_count_that_looks_differentiable_is_refused(subject):
    refs = defaults(subject, TWO)
    varies = "varies although its gradient is zero"
    with refused(ValueError, subject.name, "a score with a gradient", varies, "soft_count"), patient():
        fast(subject, otsu_count)(TWO, *refs, **subject.extra())


@by_gradients()
def a_count_is_refused_in_a_batch_too(subject):
    refs = defaults(subject, TWO)
    explain = eg.batched(fast(subject, otsu_count), in_dims=(0, *[None] * len(refs)))
    with refused(ValueError, subject.name, "a score with a gradient", "otsu_count"), patient():
        explain(torch.stack([TWO, 2 * TWO]), *refs, **subject.extra())


@differentiating()
def a_saturated_score_is_not_refused(subject):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a = run(subject, lambda z: z.clamp(max=1).sum(), torch.full((1, 2), 2.0))
    assert torch.isfinite(a).all()
    local = eg.gradient(lambda z: z.clamp(max=1).sum())(torch.full((1, 2), 2.0))
    assert torch.equal(local, ZERO)


@evaluating(NAN, INF)
def a_score_is_finite(subject, value):
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


def test_transforms_refuse_what_methods_refuse():
    for subject in PLAIN:
        explain, refs = subject.build(square), defaults(subject, TWO)
        name = subject.name.partition("(")[0]
        with refused(ValueError, r"\w+", "finite values in x", "1 NaN or infinite"):
            explain(torch.tensor([[1.0, NAN]]), *refs, **subject.extra())
        with refused(TypeError, r"\w+", "x of a floating dtype", "int64"):
            explain(TWO.long(), *refs, **subject.extra())
        if subject.key:
            with refused(TypeError, name, "key= ", "no key"):
                explain(TWO, *refs)
        else:
            with refused(TypeError, name, r"explain\(x", "key=int 3", "leave the key out"):
                explain(TWO, *refs, key=3)
        assert list(inspect.signature(explain).parameters) == ["x", *subject.refs, *["key"] * subject.key]
        by_name = explain(TWO, **dict(zip(subject.refs, refs, strict=True)), **subject.extra())
        assert torch.equal(by_name, explain(TWO, *refs, **subject.extra()))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_take_explanations(name):
    spec = TRANSFORMS[name]
    for wrong, advice in [
        (TWO, rf"not its map: {name}\(explain\)\(x\)"),
        (None, "Pass the explanation"),
        (3, "Pass the explanation"),
        (nn.Conv1d(1, 1, 1), "from_module"),
        (eg.gradient, r"gradient\(score\)"),
        (eg.grad_cam, r"grad_cam\(score\)"),
    ]:
        with refused(TypeError, name, "an explanation", "", advice):
            spec.fn(wrong, **spec.example)
    for answer in (None, 3.0, (), [TWO], TWO.long()):
        kinds = {"baseline": ZERO, "baselines": torch.zeros(3, 1, 2)}
        refs = spec.refs(()) if spec.refs(()) is not None else spec.refs(("baseline",))
        explain = spec.fn(lambda x, *refs, answer=answer, **extra: answer, **spec.example)
        with refused(TypeError, name, "an explanation that returns a floating tensor", "", "one map like x"):
            explain(TWO, *[kinds[r] for r in refs], **({"key": 7} if spec.key else {}))


def test_what_is_done_to_values_is_done_at_every_place():
    score = lambda x: (eg.mark(2 * x, "a") * eg.mark(-x, "b")).sum()
    maps = eg.absolute(eg.layer_gradient(score, ["a", "b"]))(TWO)
    assert [a.tolist() for a in maps] == [[[1.0, 2.0]], [[2.0, 4.0]]]


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


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_refuse_networks(name):
    """Taken for a model, a network would see the channels as its batch."""
    spec = REDUCERS[name]
    for network in (nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1).forward, functools.partial(nn.Dropout())):
        with refused(
            TypeError, name, "a model: a function", "an nn.Module", r"esegeta\.from_module\(module\.eval"
        ):
            spec.fn(network, **spec.example, **({"at": torch.ones(1, 4, 4)} if spec.mask else {}))


def test_networks_are_refused_wherever_a_function_is_expected():
    net, x = nn.Conv2d(1, 2, 1).eval(), torch.ones(1, 4, 4)
    for name, call in {
        **{
            kind: lambda kind=kind: getattr(eg, kind)(net, "0")
            for kind in ("split", "tap", "replace", "nudge")
        },
        **{k: lambda k=k: getattr(eg.rules, k)(net) for k in ("guided", "deconvnet", "lrp", "excitation")},
        "places": lambda: eg.places(net, x),
        "activation_and_gradient": lambda: eg.activation_and_gradient(net, "0"),
        "at": lambda: eg.at("gradient", "0")(net),
        "batched": lambda: eg.batched(net),
        "explained": lambda: next(eg.explained(net, [x])),
        "fuse": lambda: eg.fuse([net]),
        "with_standard_error": lambda: eg.with_standard_error(net),
        "on_trees": lambda: eg.on_trees(eg.gradient)(net),
        "noise_grad": lambda: eg.noise_grad(lambda p: net, {"w": x}),
        "deeplift": lambda: eg.rules.deeplift(net, x),
        "coverage": lambda: eg.rules.coverage(net, x),
        "locality": lambda: eg.locality(net, x),
        "sliding_window": lambda: eg.models.sliding_window(net, 2),
        "lime_fit": lambda: eg.lime_fit(net),
        "full_gradient": lambda: eg.full_gradient(net),
        "adaptive_integrated_gradients": lambda: eg.adaptive_report(net),
    }.items():
        with refused(TypeError, name, "a function|a method", "an nn.Module, Conv2d", "from_module"):
            call()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_network_says_which_axis_is_missing_or_too_many(axes, channels):
    for classes in (1, 3):
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        net = nn.Sequential(
            convolution(channels, 2, 3, padding=1), nn.ReLU(), convolution(2, classes, 1)
        ).eval()
        explain = eg.gradient(eg.reducers.class_sum(eg.from_module(net), 0))
        x = torch.ones(channels, *[4] * axes)
        assert explain(x).shape == x.shape
        for wrong, advice in [
            (x[None], "esegeta.batched"),
            (x.expand(5, *x.shape), "esegeta.batched"),
            (x[None, None], "one example"),
            (x[0], r"x\[None\]"),
            (torch.cat([x, x]), "how many there are"),
        ]:
            shape = rf"one example \(C,\*S\), here \({channels}, "
            with refused(ValueError, "Sequential", shape, re.escape(f"float32{tuple(wrong.shape)}"), advice):
                explain(wrong)
            with refused(ValueError, "Sequential", shape, "", advice):
                eg.batched(explain)(torch.stack([wrong, wrong]))


class Adding(nn.Module):
    """Adds the channel axis itself."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.convolution(x[:, None]).mean((2, 3))


def test_a_network_may_add_the_channels_itself():
    explain = eg.gradient(eg.reducers.logit(eg.from_module(Adding().eval()), 1))
    assert explain(torch.ones(4, 4)).shape == (4, 4)


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
    run = eg.adaptive_report(square)
    with refused(ValueError, "adaptive_integrated_gradients", "baseline with the shape", r"\(1, 1\)", ""):
        run(TWO, TWO[:, :1])
    with refused(ValueError, "adaptive_integrated_gradients", "finite values in x", "1 NaN", ""):
        run(TWO * torch.tensor([[NAN, 1.0]]), TWO)
