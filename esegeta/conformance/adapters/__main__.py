"""What was found in other libraries, as a table: ``python -m esegeta.conformance.adapters`` writes it to the docs."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from esegeta.conformance.adapters.batches import examples_apart
from esegeta.conformance.verdicts import Verdict
from esegeta.conformance.verify import verify

COMMAND = "python -m esegeta.conformance.adapters"
PAGE = Path(__file__).parents[3] / "docs" / "other_libraries.md"
_MARKED = re.compile(r"(<!-- found -->\n).*?(<!-- end of found -->)", re.DOTALL)

PACKAGES = {"grad_cam": "grad-cam"}  # where the package is called otherwise
CASES = 100
APART = "examples_apart"

# What is put to the test: a method, and the axioms that its definition, or its documentation, makes one expect.
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("captum:IntegratedGradients", ("completeness", "implementation_invariance", APART)),
    ("captum:IntegratedGradients(method='riemann_trapezoid')", ("completeness",)),
    ("captum:DeepLift", ("completeness", APART)),
    ("captum:GuidedBackprop", ("implementation_invariance", "completeness")),
    ("captum:LayerConductance", ("completeness",)),
    ("captum:LayerConductance(method='riemann_trapezoid')", ("completeness",)),
    ("captum:LayerGradCam", ("completeness",)),
    ("captum:LRP", ("conservation",)),
    ("captum:FeatureAblation", ("completeness", "dummy")),
    ("captum:ShapleyValueSampling", ("completeness",)),
    ("zennit:IntegratedGradients", ("completeness",)),
    ("zennit:IntegratedGradients(n_iter=200)", ("completeness",)),
    ("zennit:EpsilonPlus", ("conservation",)),
    ("shap:DeepExplainer(check_additivity=False)", ("completeness",)),
    ("shap:ExactExplainer", ("completeness", "symmetry")),
    ("monai:VanillaGrad", ("implementation_invariance",)),
    ("monai:SmoothGrad", ("dummy", "scale_of_output")),
    ("monai:GradCAM", ("scale_of_output",)),
    ("grad_cam:GradCAM", ("scale_of_output",)),
    ("grad_cam:HiResCAM", ("conservation",)),
)


def version(method: str) -> str:
    """Return the library of a method with its version."""
    library = method.partition(":")[0]
    return f"{library} {importlib.metadata.version(PACKAGES.get(library, library))}"


def verdicts(cases: int = CASES) -> Iterator[tuple[str, Verdict]]:
    """Return the answers, one after the other."""
    for method, axioms in QUESTIONS:
        for axiom in axioms:
            apart = axiom == APART
            found = (
                examples_apart(method, cases=cases)
                if apart
                else verify(method, axioms=[axiom], cases=cases)[axiom]
            )
            yield method, found


def row(method: str, found: Verdict) -> str:
    """Return one answer as a line of a table."""
    seen = f"{found.cases} cases" + (f", {found.refused} refused" if found.refused else "")
    if found.counterexample is not None:
        network = re.search(r"(?:Case|Together)\(.*", found.counterexample.code)
        seen = f"{found.counterexample.residual:.2g} is left: `{network[0][:150] if network else ''}`"
    elif not found.cases:
        seen = found.why[:100]
    cells = (
        version(method),
        f"`{method.partition(':')[2]}`",
        found.axiom,
        found.kind,
        seen.replace("|", r"\|"),
    )
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """Return all answers as a Markdown table."""
    rows = []
    for method, found in verdicts():
        rows.append(row(method, found))
        print(rows[-1], end="", file=sys.stderr, flush=True)  # it takes minutes
    return "".join(["| library | method | axiom | verdict | |\n", "| --- | --- | --- | --- | --- |\n", *rows])


def write() -> None:
    """Put the table where the page has its marks."""
    made = table()
    PAGE.write_text(_MARKED.sub(lambda m: m[1] + made + m[2], PAGE.read_text()))


if __name__ == "__main__":
    write()
