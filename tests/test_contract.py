"""What every method keeps, and every transform of every method. The checks are those of ``esegeta.conformance``."""

import copy

import pytest
import torch
from cases import make_case
from together import together
from torch.func import vmap

import esegeta as eg
from esegeta._registry import METHODS as REGISTERED
from esegeta._registry import TRANSFORMS
from esegeta.conformance import Case, Network, contract, subjects
from esegeta.conformance.contract import CHECKS, OF_TRANSFORMS, SMOOTH, answer, assert_near, examples, same
from esegeta.conformance.subjects import TRANSFORMED

SUBJECTS = list(subjects(fast=True))
METHODS = [s for s in SUBJECTS if not s.composite]
VOLUME = Case(
    Network((2, 2, 2, 3), ("conv", "relu", ("add", "conv"), "max pool"), "sum", 5),
    torch.linspace(-2, 2, 24).reshape(2, 2, 2, 3).round(decimals=2),
    torch.linspace(1, -1, 24).reshape(2, 2, 2, 3).round(decimals=2),
    torch.linspace(-1, 1, 48).reshape(2, 2, 2, 2, 3).round(decimals=2),
)
SINGLE_LINE = Case(
    Network((1, 6), ("conv", "functional relu", "strided conv", "softplus"), "sum", 2, dtype="float32"),
    [[0.5, -1.25, 2, 1, 0.75, -0.5]],
    [[0, 0.25, 1, 0, -1, 0.5]],
    [[[0, 0.25, 1, 0, -1, 0.5]], [[1, 1, 0, 0.5, 0, 0]]],
    dtype="float32",
)


def keeps_all(subject, checks):
    applying = [c for c in checks if not contract.inapplicable(c, subject)]
    together("check", applying)(lambda check: contract.check(check, subject))()


def promised():
    """What every method promises, and what follows for every transform of every method that it applies to."""
    for name, spec in REGISTERED.items():
        yield name, (spec.refs, spec.key, spec.axioms)
        for outer, change in TRANSFORMS.items():
            refs = change.refs(spec.refs)
            if refs is not None:
                yield f"{outer}({name})", (refs, spec.key or change.key, spec.axioms & change.preserves)


def test_the_subjects_are_what_is_registered():
    expected = dict(promised())
    found = {s.name: (s.refs, s.key, s.axioms) for s in SUBJECTS}
    assert found == {name: expected[name] for name in found}
    inner = {name: name.rpartition("(")[2].rstrip(")") for name in expected}
    assert {inner[name] for name in set(expected) - set(found)} == set(REGISTERED) - TRANSFORMED
    assert set(REGISTERED) <= set(found)
    shapes = {spec.shape for name, spec in REGISTERED.items() if spec.place and name in TRANSFORMED}
    assert shapes == {"map", "layer"}


@pytest.mark.parametrize("subject", METHODS, ids=repr)
def test_contract(subject):
    keeps_all(subject, CHECKS)


# A transform sees no more of a method than its form: one without tensors, one that draws, one at a place.
FORMS = ("(gradient)", "(gradient_shap)", "(grad_cam)")
# They look at some 340 coarse masks before their first step.
SEARCHING = ("extremal_perturbation", "meaningful_perturbation")
# Their way to compute is that of one that stays: paths, draws of coalitions, permutations, masks, layers, relevance.
ALIKE = (
    *("adaptive_integrated_gradients", "guided_integrated_gradients", "blur_integrated_gradients", "idgi"),
    *(
        "partition_shap",
        "shapley_sampling",
        "kernel_shap",
        "lime",
        "feature_shuffling",
        "rise",
        "hsic_attribution",
    ),
    *("conductance", "neuron_conductance", "internal_influence", "contrastive_excitation_backprop"),
)


def marked(chosen, slow):
    return [pytest.param(s, id=repr(s), marks=[pytest.mark.slow] if slow(s.name) else []) for s in chosen]


@pytest.mark.parametrize(
    "subject", marked([s for s in SUBJECTS if s.composite], lambda name: not name.endswith(FORMS))
)
def test_contract_of_transforms(subject):
    keeps_all(subject, OF_TRANSFORMS)


# The networks are piecewise linear, which a method of second derivatives warns of.
FLAT = pytest.mark.filterwarnings("ignore:.*the second derivative of:esegeta.ExecutionWarning")


@FLAT
@pytest.mark.parametrize("subject", marked(METHODS, (*SEARCHING, *ALIKE).__contains__))
@together("case", [VOLUME, SINGLE_LINE], ids=["volume", "line in single precision"])
def test_contract_on_networks(case, subject):
    for check in ("shape_and_dtype", "repeatable", "batched_equals_loop"):
        CHECKS[check](subject, case)


@FLAT
@pytest.mark.slow
@pytest.mark.parametrize("subject", METHODS, ids=repr)
@together("check", ["chunk_free", "independent_of_batch", "any_strides", "differentiable"])
def test_contract_on_a_volume(check, subject):
    CHECKS[check](subject, VOLUME)


@together("subject", [s for s in SUBJECTS if not s.key], ids=repr)
def test_a_key_is_taken_only_where_something_is_drawn(subject):
    with pytest.raises(TypeError):
        subject.build(SMOOTH.score)(SMOOTH.x, *SMOOTH.refs(subject.refs), key=7)


@pytest.mark.slow
@FLAT
def test_nested_maps_equal_loops():
    for subject in METHODS:
        explain, refs, xs = subject.build(SMOOTH.score), SMOOTH.refs(subject.refs), examples(SMOOTH)
        xs = torch.stack([xs, xs.flip(0) / 2])
        run = lambda x: explain(x, *refs, **subject.extra())
        loop = torch.stack([torch.stack([run(x) for x in row]) for row in xs])
        assert_near(vmap(vmap(run))(xs), loop, SMOOTH, f"{subject}: vmap of vmap")
        assert_near(eg.batched(vmap(run))(xs), loop, SMOOTH, f"{subject}: batched of vmap")


@FLAT
def test_a_copied_module_gives_the_same_answer():
    case = contract.NETWORK
    twin = eg.from_module(copy.deepcopy(case.score.module))
    for subject in METHODS:
        other = subject.build(twin)(case.x, *case.refs(subject.refs), **subject.extra())
        assert same(other, answer(subject, case)), subject.name


@pytest.mark.parametrize("kind", ["softplus", "segmentation"])
def test_tensors_of_inference_mode_are_welcome(kind):
    case = make_case(kind, axes=2, channels=1)
    with torch.inference_mode():
        x = case.x.clone()
    assert same(eg.gradient(case.score)(x).clone(), eg.gradient(case.score)(case.x))
