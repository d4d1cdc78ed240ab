"""Transforms, reducers and rewrites as subjects: each law rejects what is broken in the way that it is for."""

import functools

import pytest
import torch

import esegeta as eg
from esegeta import _registry, conformance
from esegeta.axioms import registered
from esegeta.conformance import (
    LAWS,
    REDUCER_LAWS,
    REWRITE_LAWS,
    law,
    lawbook,
    rebuilt,
    search,
    subject_of,
    verify,
)
from esegeta.conformance.kinds import TransformSubject
from esegeta.conformance.lawbook import MethodLaw, laws_for
from esegeta.conformance.scoring import ReducerSubject, RewriteSubject
from esegeta.engine import levels
from esegeta.engine.operators import reroute
from esegeta.rules import rewriting


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Any counterexample will do; what is registered here is gone afterwards; every rule is compared anew."""
    monkeypatch.setattr(search, "SHRINKS", 5)
    monkeypatch.setattr(rewriting, "_COMPARED", {})
    tables = (_registry.METHODS, _registry.TRANSFORMS, _registry.REDUCERS)
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


def violated(subject, law, cases=60):
    report = verify(subject, axioms=[law], cases=cases)
    found = report[law]
    assert found.kind == "violated", report
    again, allowed = rebuilt(found.counterexample.code), found.counterexample.allowed
    assert repr(again) == found.counterexample.code
    assert not found.counterexample.residual <= allowed
    return report


# -- told apart ----------------------------------------------------------------------------------------------------


def turned(explain):
    return lambda x, *refs: -explain(x, *refs)


def half_sum(model):
    return lambda x: model(x).sum() / 2


def kept(score):
    return lambda x: score(x)


def total(model):
    return lambda x: model(x).sum()


def slope(model):
    """A method, whatever its argument is called."""
    return torch.func.grad(model)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("smooth", TransformSubject),
        (eg.smooth, TransformSubject),
        (turned, TransformSubject),
        ("class_sum", ReducerSubject),
        (eg.reducers.class_sum, ReducerSubject),
        (half_sum, ReducerSubject),
        (total, ReducerSubject),
        (lambda score: lambda x: score(x).sum(), RewriteSubject),
        (slope, conformance.Subject),
        ("rules.lrp", RewriteSubject),
        (eg.rules.deeplift, RewriteSubject),
        (functools.partial(eg.rules.lrp, composite="epsilon_plus"), RewriteSubject),
        (kept, RewriteSubject),
        ("lrp", conformance.Subject),
        (eg.gradient, conformance.Subject),
        (lambda score: torch.func.grad(score), conformance.Subject),
    ],
)
def test_what_is_put_to_the_test_is_recognised(what, kind):
    assert isinstance(subject_of(what), kind)


@pytest.mark.parametrize(
    ("what", "got"),
    [
        (lambda score: lambda x: torch.func.grad(score)(x).sum(), "whose number is .* where the score is"),
        (lambda score: lambda x, baseline=None: 0 * x.sum(), "whose number is 0 where the score is"),
        (
            lambda f: lambda x: 2 * f(x),
            "call the first argument explain for a transform, model for a reducer",
        ),
        (lambda f: lambda x: f(x).sum(), "which makes a number of a map as well, .* score for a rewrite"),
    ],
    ids=["sum of a gradient", "zero", "unnamed transform", "unnamed reducer"],
)
def test_a_number_that_is_not_the_scores_makes_no_rewrite(what, got):
    """A method that returns a number by mistake is no rewrite that breaks a law; what could be both is asked for."""
    with pytest.raises(TypeError, match=rf"^verify: expected a .*{got}"):
        verify(what, axioms=["same_values"])


def test_a_subject_of_a_module_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "my_subjects.py").write_text(
        "from esegeta.conformance.scoring import RewriteSubject\n"
        "twice = RewriteSubject('twice', lambda score: lambda x: 2 * score(x))\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    report = verify("my_subjects:twice", axioms=["same_values"], cases=40)
    assert report.broken == ("same_values",)
    for name in ("number", "nothing"):
        with pytest.raises(ValueError, match="expected a function or a subject of my_subjects"):
            verify(f"my_subjects:{name}")


def test_a_transform_of_a_module_is_no_method(tmp_path, monkeypatch):
    (tmp_path / "my_transforms.py").write_text(
        "def doubled(explain):\n    return lambda x, *refs: 2 * explain(x, *refs)\n"
    )
    monkeypatch.chdir(tmp_path)
    subject = subject_of("my_transforms:doubled")
    assert isinstance(subject, TransformSubject)
    assert subject.name == "my_transforms:doubled"
    assert {m.name for m in subject.members} >= {"doubled(gradient)", "doubled(integrated_gradients)"}
    report = verify("my_transforms:doubled", axioms=["completeness"], cases=40)
    assert [v.kind for v in report.verdicts] == ["violated"]


def test_what_is_no_transform_and_no_rewrite_says_so():
    with pytest.raises(
        TypeError, match="verify: expected a transform: explain -> explain, got broken, which raised"
    ):
        verify(broken)
    with pytest.raises(
        ValueError, match=r"expected the name of a rewrite, got 'rules.guidde'. There are .*guided"
    ):
        verify("rules.guidde")
    with pytest.raises(ValueError, match="expected axioms to be one of one_number"):
        verify("class_sum", axioms=["linearity"])


def broken(explain):
    return explain.nothing


# -- claims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "advice"),
    [("completness", "Nearest: completeness"), ("nothing", "There are affine_equivariance, ")],
)
def test_a_claim_is_the_name_of_an_axiom(name, advice):
    with pytest.raises(
        ValueError, match=f"^mine: expected axioms to be names of axioms, got '{name}'. {advice}"
    ):

        @eg.method(axioms=(name,), paper="ours")
        def mine(score):
            return lambda x: x

    with pytest.raises(ValueError, match=r"^mine_too: expected preserves to be names of axioms"):

        @eg.transform(preserves=f"linearity {name}", paper="ours")
        def mine_too(explain):
            return explain


def test_the_names_of_axioms_are_those_of_the_laws():
    assert set(LAWS) == set(eg.axioms.AXIOMS)
    assert all(getattr(eg.axioms, name) is residual for name, residual in eg.axioms.AXIOMS.items())


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: None, "one tensor, got NoneType None"),
        (lambda x: (x,), "one tensor, got tuple"),
        (lambda x: x[0], r"of shape \(1, 2, 3\), got float32\(2, 3\)"),
        (lambda x: x.sum(), r"of shape \(1, 2, 3\), got float32\(\)"),
    ],
)
def test_a_registered_method_returns_an_explanation(answer, got):
    @eg.method(paper="ours", needs="values")
    def strange(score):
        return lambda x: answer(x)

    with pytest.raises(TypeError, match=f"^strange: expected an explanation .*{got}"):
        strange(lambda x: x.sum())(torch.ones(1, 2, 3))


# -- transforms ----------------------------------------------------------------------------------------------------


def test_a_transform_that_falsely_preserves_is_found():
    @eg.transform(preserves="completeness linearity", paper="ours")
    def halved(explain):
        return lambda x, *refs, **key: explain(x, *refs, **key) / 2

    report = verify("halved", axioms=["completeness", "linearity"], cases=60)
    assert report["linearity"].kind == "holds"
    assert report.broken == ("completeness",)
    assert report["completeness"].why.startswith("by halved(")
    assert ", by halved(" in str(report)


# -- reducers ------------------------------------------------------------------------------------------------------


def class_sum(model):
    return lambda x: model(x)[1].sum()


def in_parts(model):
    return lambda x: model(x).flatten(1).sum(1)


def writing(model):
    return lambda x: model(x.mul_(2)).sum()


def of_the_batch(model):
    return lambda x: model(x)[1].sum() + levels.base(x).detach().mean()


def thawed(model, at):
    """The mask of every input is its own."""
    return lambda x: (model(x)[1] * (model(x).argmax(0) == 1)).sum() + 3 * (model(x).argmax(0) == 1).sum()


def counting(model):
    def score(x):
        z = torch.nn.functional.softplus(model(x)[1])
        return (z / z * (z > 0.7)).sum()

    return score


MUTANTS = [
    ("one_number", in_parts),
    ("pure", writing),
    ("batches", of_the_batch),
    ("frozen_mask", thawed),
    ("true_gradient", counting),
    ("true_gradient", ReducerSubject("boasting", lambda model, at: class_sum(model), differentiable=False)),
]


@pytest.mark.parametrize(("law", "mutant"), MUTANTS)
def test_a_law_of_reducers_rejects(law, mutant):
    report = violated(mutant, law)
    assert report.broken == (law,)


def test_every_law_of_reducers_has_a_mutant():
    assert {law for law, _ in MUTANTS} == set(REDUCER_LAWS)


ACCEPTED_REDUCERS = ("predicted_class_sum", "class_sum", "predicted_count", "logit")


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTED_REDUCERS)
def test_the_laws_accept_reducers(name):
    report = verify(name, cases=50)
    assert {v.kind for v in report.verdicts} <= {"holds", "not applicable"}, report
    assert not report.broken
    assert report["one_number"].kind == "holds"


# -- rewrites ------------------------------------------------------------------------------------------------------


def doubled(score):
    return lambda x: 2 * score(x)


def undeclared(score):
    """Its gradient is twice as large, and nothing is reported as rewritten."""

    def changed(x):
        y = score(x)
        return 2 * y - y.detach()

    changed.rewritten = True
    return changed


def by_the_batch(score):
    def changed(x):
        y, size = score(x), float(levels.base(x).abs().amax()) + 1
        return y.detach() + size * (y - y.detach())

    return changed


def once_more(score):
    """The second derivative loses what the first one depends on."""

    class Slope(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return score(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * torch.func.grad(score)(x.detach()) + 0 * g * x

    return lambda x: Slope.apply(x)


REWRITTEN = [
    ("same_values", doubled),
    ("declared_differences", undeclared),
    ("batches_of_derivatives", by_the_batch),
    ("true_second_derivative", once_more),
]


@pytest.mark.parametrize(("law", "mutant"), REWRITTEN)
def test_a_law_of_rewrites_rejects(law, mutant):
    report = violated(RewriteSubject(mutant.__name__, mutant), law, cases=100)
    assert report.broken == (law,)


def test_every_law_of_rewrites_has_a_mutant():
    assert {law for law, _ in REWRITTEN} == set(REWRITE_LAWS)


@pytest.mark.parametrize(
    "name", [*(pytest.param(f"rules.{n}", marks=pytest.mark.slow) for n in ("guided", "deeplift")), kept]
)
def test_the_laws_accept_rewrites(name):
    report = verify(name, cases=42)
    assert not {v.kind for v in report.verdicts} & {"violated"}, report
    assert report["same_values"].kind == "holds"


# -- rules keep values ---------------------------------------------------------------------------------------------


def twice(layer):
    return 2 * layer.value


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv1d(1, 3, 1), torch.nn.ReLU(), torch.nn.Conv1d(3, 2, 1)).eval()


SCORE = eg.reducers.class_sum(eg.from_module(network()), 1)
X = torch.linspace(-1, 2, 6)[None]


def test_a_rule_of_relevance_that_changes_the_value_is_named():
    composite = eg.rules.Composite(conv=twice)
    with pytest.raises(
        ValueError, match=r"^lrp: expected rules that keep the values .*, got twice for 'conv1d' in '0'"
    ):
        eg.lrp(SCORE, composite=composite)(X)
    with pytest.raises(ValueError, match="got twice"):
        torch.func.vmap(eg.lrp(SCORE, composite=composite))(torch.stack([X, 2 * X]))
    wrong = verify(functools.partial(eg.rules.lrp, composite=composite), axioms=["same_values"], cases=40)
    assert wrong["same_values"].kind != "holds"
    assert "expected rules that keep the values" in wrong["same_values"].why
    assert torch.isfinite(eg.lrp(SCORE)(X)).all()


def test_a_rule_of_an_operation_that_changes_the_value_or_the_shape_is_named(monkeypatch):
    plain = rewriting.RULES["guided"]["relu"]
    for wrong, what in (
        (lambda op: plain(op) + 1, "which changes values of at most"),
        (lambda op: plain(op)[None], "which makes float32"),
    ):
        monkeypatch.setitem(rewriting.RULES["guided"], "relu", wrong)
        with pytest.raises(
            ValueError, match=f"^guided: expected rules that keep .*for 'relu' in '1', {what}"
        ):
            eg.guided_backprop(SCORE)(X)


def test_a_rule_is_compared_once_for_a_network_and_a_shape(monkeypatch):
    calls = []

    def counted(op):
        def run(*inputs):
            calls.append(op.name)
            return torch.relu(*inputs)

        op.call = run
        return reroute(torch.relu(*op.inputs), op.inputs, lambda g, *_: g)

    monkeypatch.setitem(rewriting.RULES["guided"], "relu", counted)
    for _ in range(3):
        eg.guided_backprop(SCORE)(X)
    assert len(calls) == 1
    eg.guided_backprop(SCORE)(torch.cat([X, X], 1))
    assert len(calls) == 2


@pytest.fixture
def of_ones_own(monkeypatch):
    """A residual and a law that somebody else registers: an axiom takes no line anywhere else."""
    table = laws_for("method")
    monkeypatch.setattr(lawbook, "_LAWS", {**lawbook._LAWS, "method": (laws := dict(table))})
    monkeypatch.setattr(registered, "AXIOMS", claimable := dict(registered.AXIOMS))
    monkeypatch.setattr(_registry, "AXIOMS", claimable)

    @eg.axioms.axiom
    def oddness(method, score):
        return lambda x, *refs, **key: (method(score)(x) + method(score)(-x)).abs().amax()

    @law("oddness")
    class Oddness(MethodLaw):
        def measure(self, subject):
            return self.run(subject, subject.build, lambda build: oddness(build, self.case.score))

    return laws


def test_an_axiom_of_ones_own_can_be_claimed_and_is_tried(of_ones_own):
    @eg.method(axioms="oddness linearity", paper="ours")
    def odd(score):
        return lambda x: x * score(torch.ones_like(x))

    @eg.method(axioms="oddness", paper="ours")
    def even(score):
        return lambda x: x**2

    assert verify("odd", axioms=["oddness"], cases=60)["oddness"].kind == "holds"
    assert verify("even", axioms=["oddness"], cases=60).broken == ("oddness",)
    with pytest.raises(ValueError, match="law: expected a new name, got 'oddness', a law of "):
        law("oddness")(object)
    with pytest.raises(ValueError, match="axiom: expected a new name, got 'dummy', already defined in "):
        eg.axioms.axiom(eg.axioms.dummy)
    with pytest.raises(ValueError, match="law: expected of to be one of method, reducer, rewrite, metric"):
        law("oddness", of="nothing")
