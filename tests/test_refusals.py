"""Refusals are told apart by their class and by who refuses, never by the words of a message."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import esegeta as eg
from esegeta.engine import check
from esegeta.rules import Layer
from esegeta.rules.lrp import folded


def test_an_error_of_the_user_keeps_its_words():
    """It looks like a refusal of a block that methods are made of, and is none."""

    def score(x):
        raise ValueError("tap: expected more, got less. Ask again.")

    with pytest.raises(ValueError, match=r"^tap: expected more, got less"):
        eg.grad_cam(score, "copy")(torch.ones(1, 4, 4))


def test_a_refusal_inside_a_method_names_the_method():
    net = eg.from_module(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(check.Refused, match=r"^grad_cam: expected a place") as caught:
        eg.grad_cam(eg.reducers.class_sum(net, 0), "nowhere")(torch.ones(1, 4, 4))
    assert caught.value.args[0].where == "grad_cam"


def test_a_refusal_travels_between_processes():
    for error in (check.refused("a", "b", "c\nd", "e"), check.refused_type("a", "b", "c", "e")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (
            str(again) == str(error) == f"a: expected b, got {'c d' if 'd' in str(error)[17:] else 'c'}. e."
        )
        assert again.args[0].where == "a"
        assert check.is_refusal(again)


def test_a_network_that_fails_with_words_of_a_refusal_is_told_the_axes_it_wants():
    class Own(nn.Conv2d):
        def forward(self, x):
            if x.shape[1] != 3:
                raise ValueError("shape: expected 3 channels")
            return super().forward(x)

    with pytest.raises(ValueError, match=r"expected one example \(C,\*S\), here \(3, \*, \*\), got"):
        eg.from_module(Own(3, 1, 1))(torch.ones(1, 4, 4))


def test_a_layer_says_whether_its_weights_are_transposed():
    x, value = torch.ones(1, 2, 4), torch.ones(1, 6, 4)
    weight, scale = torch.ones(2, 6, 1), torch.arange(1.0, 7)
    layer = Layer(x, weight, None, value, nn.functional.conv_transpose1d, "conv", transposed=True)
    assert torch.equal(folded(layer, scale)[0, :, 0], scale)
    plain = Layer(x, weight.transpose(0, 1), None, value, nn.functional.conv1d, "conv")
    assert torch.equal(folded(plain, scale)[:, 0, 0], scale)


def test_no_module_raises_the_words_of_a_refusal_without_its_class():
    """``raise ValueError(problem(...))`` looks like a refusal to a reader and like a failure to a worker."""
    package = Path(eg.__file__).parent
    plain = re.compile(r"raise (ValueError|TypeError|check\.Refused|check\.RefusedType)\(\s*check\.problem\(")
    found = [path for path in sorted(package.rglob("*.py")) if plain.search(path.read_text("utf-8"))]
    assert [path.relative_to(package).as_posix() for path in found] == []
