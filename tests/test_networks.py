"""Networks from the zoo, from functions with weights, from programs; and every way in which that can fail."""

import os
import pickle
import warnings

import pytest
import torch

from esegeta.run.config import sources as networks
from esegeta.run.config.loading import Model
from esegeta.run.config.trust import asked

SOURCE = """
import torch
from torch import nn

def build(width=4, classes=2):
    first, last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, classes, 1)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), last)

class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()
    def forward(self, x):
        return {"logits": [self.net(x), x]}

def fails():
    raise RuntimeError("no such thing\\nsecond line")

def leaves():
    raise SystemExit(0)

def number():
    return 3

value = 3
made = build()
"""
X = torch.linspace(-1, 1, 64).reshape(1, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A module with a network, and files of weights, good and bad."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets_of_mine.py").write_text(SOURCE)
    (folder / "needs_nothing_there.py").write_text("import not_there_at_all")
    (folder / "not_python.py").write_text("def (")
    net = load(folder, source="nets_of_mine:build").module
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.5)
    state = dict(net.state_dict())
    torch.save(state, folder / "plain.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.net.{k}": v for k, v in state.items()}}, folder / "nested.pth"
    )
    old = {k: v for k, v in state.items() if "num_batches" not in k}
    torch.save(old, folder / "old.pt")
    from safetensors.torch import save_file

    save_file(state, folder / "plain.safetensors")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, folder / "half.safetensors")
    (folder / "cut.pt").write_bytes((folder / "plain.pt").read_bytes()[:900])
    (folder / "cut.safetensors").write_bytes((folder / "plain.safetensors").read_bytes()[:-10])
    (folder / "text.pt").write_text("hello")
    (folder / "empty.pt").write_bytes(b"")
    torch.save(net, folder / "whole.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "nothing.pt")
    torch.save(
        {**{k: v for k, v in state.items() if k != "0.weight"}, "0.weigth": state["0.weight"]},
        folder / "name.pt",
    )
    torch.save({**state, "7.weight": torch.zeros(1)}, folder / "more.pt")
    return folder


def load(folder, **said):
    return networks.load(Model(path=str(folder), **said), trust=asked(folder))


def refusal(folder, trust=None, **said):
    with pytest.raises(ValueError, match=r"^model: expected ") as caught:
        networks.load(Model(path=str(folder), **said), trust=trust or asked(folder))
    assert "\n" not in str(caught.value)
    assert ".." not in str(caught.value).replace("...", "")
    return str(caught.value)


def test_a_network_of_the_zoo():
    model = networks.load(Model(source="zoo:small_classifier", arguments={"classes": 5}))
    assert model(X).shape == (5,)


def test_a_factory_gives_the_same_network_every_time_and_leaves_the_random_numbers_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load(folder, source="nets_of_mine:build", arguments={"width": 3})(X)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, load(folder, source="nets_of_mine:build", arguments={"width": 3})(X))


def test_networks_come_in_evaluation_mode(folder):
    assert not load(folder, source="nets_of_mine:build").module.training
    assert not load(folder, source="nets_of_mine:made").module.training


def test_an_output_is_picked(folder):
    said = {"source": "nets_of_mine:Several", "output": ["logits", 0]}
    assert load(folder, **said)(X).shape == (2, 8, 8)


@pytest.mark.parametrize("name", ["plain.pt", "nested.pth", "old.pt", "plain.safetensors"])
def test_weights_are_put_in(folder, name):
    model = load(folder, source="nets_of_mine:build", weights=str(folder / name))
    wanted = torch.load(folder / "plain.pt", weights_only=True)
    for key, value in model.module.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(value, wanted[key]), key


def test_weights_of_lower_precision_become_those_of_the_network(folder):
    model = load(folder, source="nets_of_mine:build", weights=str(folder / "half.safetensors"))
    wanted = torch.load(folder / "plain.pt", weights_only=True)
    assert torch.equal(model.module[0].weight, wanted["0.weight"].bfloat16().float())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cut.pt", "cut.pt to hold weights, got RuntimeError: PytorchStreamReader failed"),
        ("cut.safetensors", "cut.safetensors to hold weights, got read_safetensors: expected"),
        ("text.pt", "text.pt to hold weights, got "),
        ("empty.pt", "empty.pt to hold something, got an empty file"),
        ("whole.pt", "tensors only, got a pickle that wants to make torch.nn.modules.container.Sequential"),
        ("list.pt", "tensors by name in list.pt, got list"),
        ("nothing.pt", "tensors by name in nothing.pt, got the keys 'epoch'"),
        ("name.pt", "all 9 tensors of the network, got none for 0.weight (nearest: 0.weigth)"),
        ("more.pt", "the 9 tensors of the network and no others, got 7.weight (nearest: 3.weight)"),
        ("absent.pt", "absent.pt to be a file that can be read, got no such file or directory"),
    ],
)
def test_weights_that_cannot_be_used(folder, name, text):
    assert text in refusal(folder, source="nets_of_mine:build", weights=str(folder / name))


def test_weights_of_other_shapes_are_named(folder):
    said = {"source": "nets_of_mine:build", "arguments": {"width": 6}, "weights": str(folder / "plain.pt")}
    text = refusal(folder, **said)
    assert "got 0.weight (4, 1, 3, 3) for (6, 1, 3, 3), 0.bias (4,) for (6,)" in text
    assert "and 4 more" in text


class Evil:
    """Would run a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(folder, tmp_path):
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("a.pt", "b.pth"):
        assert "tensors only, got a pickle that wants to" in refusal(
            folder, source="nets_of_mine:build", weights=str(tmp_path / name)
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("zoo:small_unett", "a network of the zoo, got 'small_unett'. Nearest: small_unet"),
        ("zoo:small_unet", "arguments that zoo:small_unet takes, got missing a required argument: 'ndim'"),
        ("nets_of_mine:bild", "a function of nets_of_mine, got 'bild'. Nearest: build"),
        ("nets_of_mein:build", "a module that can be imported, got 'nets_of_mein'"),
        ("needs_nothing_there:build", "got ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("not_python:build", "not_python to import, got SyntaxError: invalid syntax"),
        ("nets_of_mine:fails", "nets_of_mine:fails to build a network, got RuntimeError: no such thing"),
        ("nets_of_mine:leaves", "nets_of_mine:leaves to build a network, got SystemExit: 0"),
        ("nets_of_mine:number", "nets_of_mine:number to return an nn.Module, got int"),
        ("nets_of_mine:value", "nets_of_mine:value to be a function, got int"),
        ("os:system", "a function that builds a network, got 'os:system', a part of Python"),
        ("torch:os.system", "or code that you trust, got 'torch:os.system', which is in "),
        ("subprocess:Popen", "got 'subprocess:Popen', a part of Python"),
        ("builtins:exec", "got 'builtins:exec', a part of Python"),
        ("nets_of_mine", 'source to be "zoo:name", "package.module:factory" or a file'),
    ],
)
def test_a_factory_that_cannot_be_used(folder, source, text):
    assert text in refusal(folder, source=source)


def test_arguments_that_a_factory_does_not_take(folder):
    text = refusal(folder, source="nets_of_mine:build", arguments={"widht": 3})
    assert "got an unexpected keyword argument 'widht'. Its arguments are width, classes" in text


@pytest.fixture(scope="module")
def programs(folder):
    net = load(folder, source="nets_of_mine:build").module
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.zeros(1, 1, 8, 8)).save(str(folder / "net.ts"))
    (folder / "text.pt2").write_text("hello")
    return net


@pytest.mark.parametrize("name", ["net.pt2", "net.ts"])
def test_programs_are_the_network_that_they_were(folder, programs, name):
    model = networks.load(Model(source=str(folder / name)), trust=asked(folder, [str(folder)]))
    torch.testing.assert_close(model(X), programs(X[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text.pt2", "text.pt2 to be an exported program, got"),
        (
            "plain.pt",
            "plain.pt to be TorchScript, got RuntimeError: PytorchStreamReader failed locating file",
        ),
        ("cut.pt", "cut.pt to be TorchScript, got"),
        ("absent.ts", "absent.ts to be a file that can be read, got no such file or directory"),
    ],
)
def test_a_program_that_cannot_be_used(folder, programs, name, text):
    assert text in refusal(folder, trust=asked(folder, [str(folder)]), source=str(folder / name))


def test_prefixes_go_only_as_far_as_they_have_to():
    zeros = torch.zeros(1)
    given = {"_orig_mod.module.net.a": zeros, "_orig_mod.module.net.b": zeros}
    assert set(networks.without_prefix(given, {"net.a", "net.b"})) == {"net.a", "net.b"}
    assert set(networks.without_prefix({"x.a": zeros, "y.a": zeros}, {"a"})) == {"x.a", "y.a"}
