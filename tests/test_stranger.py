"""What CONTRIBUTING shows a stranger: every piece is added by its code as it stands there, in as many files."""

import csv
import doctest
import importlib
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import esegeta as eg
from esegeta import axioms, baselines, conformance
from esegeta._registry import BASELINES, METHODS, REGISTRIES
from esegeta.axioms import scores
from esegeta.conformance import lawbook, search, verify
from esegeta.rules import composites
from esegeta.run import pipeline
from esegeta.run.config import catalogue, loading, plugins, tables
from esegeta.run.config.faults import Collector
from esegeta.run.jobs import kinds

PAGE = Path(eg.__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(
    r"^```(?:python|toml)\n# (?:add to |new file )?(\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
CODE = dict(BLOCK.findall(PAGE.read_text()))
X = torch.linspace(-1, 2, 24).reshape(1, 4, 6)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers is gone afterwards."""
    tables = [*REGISTRIES, axioms.AXIOMS, kinds._KINDS, *lawbook._LAWS.values()]
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


def added(module, path):
    """The names of a module after the code for its file: what it says about itself is tried, too."""
    names = dict(vars(module))
    exec(compile(CODE[path], f"{PAGE}: {path}", "exec"), names)
    for name in re.findall(r"^(?:def|class) (\w+)", CODE[path], re.MULTILINE):
        for test in doctest.DocTestFinder().find(names[name], name, module=False, globs=names):
            result = doctest.DocTestRunner().run(test)
            assert result.failed == 0, name
    return names


def test_every_piece_of_the_page_is_tried():
    assert set(CODE) == {
        "esegeta/baselines.py",
        "esegeta/rules/composites.py",
        "esegeta/axioms/scores.py",
        "esegeta/conformance/laws/oddness.py",
        "counting.py",
        "pyproject.toml",
        "saliency_of_mine.py",
    }


def test_a_baseline_is_one_file():
    assert "median" not in BASELINES
    made = added(baselines, "esegeta/baselines.py")["median"]
    assert list(catalogue.of_method(BASELINES["median"])) == ["scale"]
    assert torch.equal(made(X, scale=0.5), 0.5 * X.median() * torch.ones_like(X))


def test_a_composite_is_one_file():
    added(composites, "esegeta/rules/composites.py")
    score = eg.reducers.class_sum(eg.from_module(eg.zoo.small_unet(2)), 1)
    a, plain = (eg.lrp(score, composite=name)(X) for name in ("gamma_flat", "epsilon"))
    assert a.shape == X.shape
    assert not torch.allclose(a, plain)


def test_an_axiom_is_two_files(monkeypatch):
    monkeypatch.setattr(search, "SHRINKS", 0)  # any counterexample will do
    names = added(scores, "esegeta/axioms/scores.py")
    monkeypatch.setattr(axioms, "oddness", names["oddness"], raising=False)
    added(conformance, "esegeta/conformance/laws/oddness.py")
    assert verify("gradient", axioms=["oddness"], cases=30)["oddness"].kind == "holds"

    @eg.method(axioms="oddness", paper="ours")
    def sized(score):
        return lambda x: eg.gradient(score)(x).abs()

    assert verify(sized, axioms=["oddness"], cases=30).broken == ("oddness",)


def install(site):
    """The package of the page in a folder of packages."""
    about = site / "saliency_of_mine-1.0.dist-info"
    about.mkdir(parents=True)
    about.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: saliency-of-mine\nVersion: 1.0\n")
    point = CODE["pyproject.toml"].splitlines()[1].replace('"', "")
    about.joinpath("entry_points.txt").write_text(f"[esegeta.plugins]\n{point}\n")
    (site / "saliency_of_mine.py").write_text(CODE["saliency_of_mine.py"])


def test_what_a_package_may_bring_that_is_not_trusted_is_told_with_the_name_to_trust(tmp_path, monkeypatch):
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    told = Collector()
    assert catalogue.found(METHODS, "difference_times_gradient", "methods[0].name", told) is None
    (line,) = told.lines
    assert "Nearest: " in line
    assert line.endswith(". Installed plugins may bring it: --trust saliency_of_mine.")
    assert "saliency_of_mine" not in sys.modules


@pytest.mark.slow
def test_a_kind_and_a_package_are_a_file_each(tmp_path, monkeypatch):
    site, here = tmp_path / "site", tmp_path / "study"
    install(site)
    here.mkdir()
    (here / "counting.py").write_text(CODE["counting.py"])
    values = np.random.default_rng(0).standard_normal((8, 6, 6)).astype(np.float32)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(here / "sub-1.nii.gz")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{sys.path[1]}")
    importlib.invalidate_caches()
    whole = {
        "plugins": [str(here / "counting.py")],
        "model": {"source": "zoo:small_unet", "arguments": {"ndim": 3}},
        "input": {"files": str(here / "sub-1.nii.gz")},
        "targets": [{"name": "half", "reducer": "half_of_class", "class": 1}],
        "methods": [{"name": "difference_times_gradient", "baseline": "zero"}],
        "counting": {"above": 0.0},
        "run": {"output": str(here / "out"), "workers": 1},
        "output": {"figures": False, "report": False},
    }
    try:
        config = loading.load(whole, trust=["saliency_of_mine", str(here)])
        assert pipeline.run(config, progress=False, threads=1).counts == {"done": 2}
    finally:
        plugins._forget("counting")
        plugins._forget("saliency_of_mine")
        plugins._offered.clear()
        plugins._loaded.clear()
    (row,) = csv.DictReader((here / "out" / "counts.csv").read_text().splitlines())
    (found,) = (here / "out").rglob("*difference*statmap.n*")
    assert int(row["count"]) == (nibabel.load(found).get_fdata() > 0).sum() > 0


def test_a_parameter_that_says_nothing_of_its_values_takes_any():
    (loose,) = catalogue.parameters(lambda model, *, target: model, skip=1).values()
    assert tables.fits(1, loose.annotation)
