"""Several inputs explained as one."""

import pytest
import torch
from torch.func import grad, vmap

import esegeta as eg


def score(tree):
    return (tree["image"] ** 2 * tree["meta"][0]).sum() + tree["meta"][1].sin()


@pytest.fixture
def tree():
    return {
        "image": torch.rand(1, 2, 3, dtype=torch.float64),
        "meta": (torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)),
    }


def leaves(tree):
    return [tree["image"], *tree["meta"]]


def zeros(tree):
    return {"image": 0 * tree["image"], "meta": tuple(0 * m for m in tree["meta"])}


def test_gradients_of_a_tree(tree):
    got, expected = eg.on_trees(eg.gradient)(score)(tree), grad(score)(tree)
    assert list(got) == ["image", "meta"]
    assert isinstance(got["meta"], tuple)
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_path_integrals_of_a_tree_are_complete(tree):
    explain = eg.on_trees(eg.integrated_gradients)(score, steps=16)
    got = explain(tree, zeros(tree))
    total = sum(a.sum() for a in leaves(got))
    torch.testing.assert_close(total, score(tree) - score(zeros(tree)))
    assert [a.shape for a in leaves(got)] == [a.shape for a in leaves(tree)]
    # t^2 image^2 meta on the line: two thirds of the share belong to the image
    torch.testing.assert_close(got["image"].sum(), 2 * got["meta"][0])


def test_trees_inside_of_maps(tree):
    many = {
        "image": torch.stack([tree["image"], 3 * tree["image"]]),
        "meta": tuple(torch.stack([m, m + 1]) for m in tree["meta"]),
    }
    explain = eg.on_trees(eg.gradient)(score)
    got = vmap(explain)(many)
    for i in range(2):
        one = explain({"image": many["image"][i], "meta": tuple(m[i] for m in many["meta"])})
        for a, b in zip(leaves(got), leaves(one), strict=True):
            torch.testing.assert_close(a[i], b)


def test_a_single_tensor_and_lists_are_trees():
    x = torch.rand(2, 3)
    torch.testing.assert_close(eg.on_trees(eg.gradient)(lambda x: (x**2).sum())(x), 2 * x)
    (a, b) = eg.on_trees(eg.gradient)(lambda t: (t[0] * t[1]).sum())([x, 2 * x])
    torch.testing.assert_close(a, 2 * x)
    torch.testing.assert_close(b, x)


def test_networks_with_several_inputs():
    net = torch.nn.Bilinear(2, 3, 1).eval()
    model = eg.from_module(net)
    a, b = torch.rand(2), torch.rand(3)
    ga, gb = eg.on_trees(eg.gradient)(lambda t: model(*t).sum())((a, b))
    w = net.weight.detach()[0]
    torch.testing.assert_close(ga, w @ b)
    torch.testing.assert_close(gb, a @ w)


def test_bad_trees_are_refused(tree):
    explain = eg.on_trees(eg.integrated_gradients)(score, steps=2)
    with pytest.raises(ValueError, match="on_trees: expected a tree like the input"):
        explain(tree, {"image": tree["image"], "meta": tree["meta"][:1]})
    with pytest.raises(ValueError, match="on_trees: expected a tree like the input"):
        explain(tree, {**tree, "image": tree["image"][:, :1]})
    with pytest.raises(TypeError, match="on_trees: expected leaf 1 of a floating dtype, got int64"):
        explain({**tree, "meta": (torch.tensor(1), tree["meta"][1])}, tree)
    with pytest.raises(TypeError, match=r"on_trees: expected tensors of one dtype, got float64.*float32"):
        explain({**tree, "meta": (tree["meta"][0].float(), tree["meta"][1])}, tree)
    with pytest.raises(TypeError, match="on_trees: expected tensors of one dtype, got no tensors"):
        eg.on_trees(eg.gradient)(lambda t: 0)({})
