"""The difference of two models: linear methods explain it as the difference of their explanations."""

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta._registry import METHODS
from esegeta.conformance.subjects import of_method
from esegeta.zoo.drawn import drawn

X = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(1, 4, 6)
REFS = {"baseline": torch.zeros_like(X), "baselines": torch.stack([torch.zeros_like(X), X.flip(-1)])}


def fold(key):
    layers = lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 1))
    return eg.from_module(drawn(layers, key).double())


A, B = fold(1), fold(2)
MASK = eg.reducers.predicted_mask(A(X), 1) ^ eg.reducers.predicted_mask(B(X), 1)
LINEAR = [
    name
    for name, spec in METHODS.items()
    if "linearity" in spec.axioms and not spec.place and spec.origin == "esegeta"
]


def test_the_score_is_the_difference_on_the_voxels_of_disagreement():
    assert 0 < MASK.sum() < MASK.numel()
    score = eg.reducers.difference(A, B, 1, at=X)
    for x in (X, -X):
        assert torch.allclose(score(x), (A(x) - B(x))[1][MASK].sum())
    own = eg.reducers.difference(A, B, 1, mask=~MASK)
    assert torch.allclose(own(X), (A(X) - B(X))[1][~MASK].sum())


def test_linear_methods_explain_exactly_the_difference():
    """One draw for all: the key and the references are the same."""
    assert len(LINEAR) > 8
    both = eg.reducers.difference(A, B, 1, at=X)
    single = [eg.reducers.region(model, 1, MASK) for model in (A, B)]
    for name in LINEAR:
        spec = METHODS[name]
        key = {"key": 7} if spec.key else {}
        refs = [REFS[kind] for kind in spec.refs]
        maps = [of_method(spec, fast=True).build(score)(X, *refs, **key) for score in (both, *single)]
        found, one, two = (m if isinstance(m, torch.Tensor) else m[0] for m in maps)
        assert torch.allclose(found, one - two, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eg.reducers.difference(A, A, 1, at=X), "the models predict the same voxels at x"),
        (lambda: eg.reducers.difference(A, B, 1), "either at= or mask=, got neither"),
        (lambda: eg.reducers.difference(A, B, 1, at=X, mask=MASK), "either at= or mask=, got both"),
        (lambda: eg.reducers.difference(A, lambda x: A(x)[:, 1:], 1, at=X), "answers on one grid"),
        (lambda: eg.reducers.uncertain_band(A, 1, at=X, low=0.9, high=0.1), "low < high"),
        (lambda: eg.reducers.uncertain_band(A, 1, at=X, low=0.0, high=1e-9), "no voxel has a probability"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
