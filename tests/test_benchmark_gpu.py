"""The script for CUDA devices: it says that there is none, and goes the same way on the processor."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("_measure", "_networks", "_questions", "peers", "gpu")


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("captum")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    for name in NAMES:
        sys.modules.pop(name, None)


def small(gpu):
    return sys.modules["_networks"].resnet(16, 2)


def test_without_a_device_it_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.SKIPPED
    said = capsys.readouterr()
    assert "gpu: expected a CUDA device, got none" in said.err
    assert "--device cpu" in said.err
    assert not said.out


def test_answers_that_differ_are_found(gpu, capsys, monkeypatch):
    ways = gpu.methods

    def fewer(subject):
        return list(ways(subject))[:1]

    monkeypatch.setattr(gpu, "methods", fewer)
    assert gpu.agreement([small(gpu)], "cpu", gpu.Clock(10))
    move = gpu.moved

    def other(subject, device):
        found = move(subject, device)
        return found._replace(score=lambda x: 1.01 * found.score(x))

    monkeypatch.setattr(gpu, "moved", other)
    assert not gpu.agreement([small(gpu)], "cpu", gpu.Clock(10))
    assert capsys.readouterr().out.count("resnet: gradient") == 2


def test_a_moved_score_is_the_same_and_what_is_late_is_named(gpu, capsys):
    subject = small(gpu)
    there, x = gpu.moved(subject, "cpu"), subject.draw(3)
    torch.testing.assert_close(there.score(x[0]), subject.score(x[0]))
    torch.testing.assert_close(there.forward(x), torch.stack([subject.score(z) for z in x]))
    assert there.net is not subject.net
    assert gpu.agreement([subject], "cpu", gpu.Clock(-1))
    assert "no time left for resnet: gradient" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_runs_on_the_processor(gpu, capsys, monkeypatch):
    networks = {"resnet": lambda: small(gpu)}
    monkeypatch.setattr(gpu, "QUICK", networks)
    assert gpu.main(["--device", "cpu", "--quick", "--minutes", "30"]) == 0
    said = capsys.readouterr().out
    for words in ("answers on the device", "one raw gradient", "auto, bfloat16", "CUDA graphs: not measured"):
        assert words in said
    assert "no time left" not in said
