"""The claims of the package: which axioms each method, transform and rule keeps, and what shows that others fail.

``python -m esegeta.conformance.claims`` searches a counterexample for every axiom that is not claimed, writes them
into ``counterexamples.json`` and the table of all of them into the documentation. The tests try them again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from esegeta._registry import METHODS, TRANSFORMS
from esegeta.conformance.laws import LAWS
from esegeta.conformance.situations import rebuilt
from esegeta.conformance.subjects import TRANSFORMED, Subject, of_transform, subjects
from esegeta.conformance.subjects import by_rule as rules_of_relevance
from esegeta.conformance.verdicts import Verdict
from esegeta.conformance.verify import verify

STORE = Path(__file__).with_name("counterexamples.json")
PAGE = Path(__file__).parents[2] / "docs" / "claims.md"

# One page cannot show why each axiom says nothing about each method; ``eg.verify`` does.
SIGNS = {"holds": "yes", "violated": "no", "not applicable": "-"}


def stored() -> dict[str, dict[str, str]]:
    """Return the counterexamples that come with the package: method, axiom, the call that rebuilds the situation."""
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def by_rule() -> list[Subject]:
    """Return the composites of rules, each claiming every axiom of which no counterexample is stored."""
    known = stored()
    return [
        replace(
            s,
            axioms=frozenset(
                a for a, law in LAWS.items() if not law.applies(s) and a not in known.get(s.name, {})
            ),
        )
        for s in rules_of_relevance()
    ]


def unclaimed(subject: Subject) -> list[str]:
    """Return the axioms that a subject does not claim although they say something about it."""
    return [a for a, law in LAWS.items() if a not in subject.axioms and not law.applies(subject)]


def violated(subject: Subject, code: str) -> bool:
    """Return whether the situation still is a counterexample."""
    residual, allowed = rebuilt(code).measure(subject)
    return not residual <= allowed


def counterexample(subject: Subject, axiom: str, cases: int = 1000) -> str | Verdict:
    """Return the code of a counterexample, or the verdict where none was found."""
    verdict = verify(subject, axioms=[axiom], cases=cases)[axiom]
    return verdict.counterexample.code if verdict.counterexample else verdict


def sign(subject: Subject, axiom: str) -> str:
    """Return what the table says."""
    if LAWS[axiom].applies(subject):
        return SIGNS["not applicable"]
    return SIGNS["holds" if axiom in subject.axioms else "violated"]


def table(chosen: Iterable[Subject]) -> str:
    """Return all subjects against all axioms."""
    return _grid((s.name, [sign(s, a) for a in LAWS]) for s in chosen)


def _grid(rows: Iterable[tuple[str, list[str]]]) -> str:
    """A line for each name, a column for each axiom."""
    lines = [
        f"| | {' | '.join(a.replace('_', ' ') for a in LAWS)} |",
        f"| --- |{' --- |' * len(LAWS)}",
        *(f"| `{name}` | {' | '.join(signs)} |" for name, signs in rows),
    ]
    return "\n".join(lines) + "\n"


def preserved() -> str:
    """Return all transforms against all axioms: what survives them."""
    sign_of = lambda kept: SIGNS["holds" if kept else "violated"]
    return _grid((name, [sign_of(a in t.preserves) for a in LAWS]) for name, t in sorted(TRANSFORMS.items()))


def lost(transform: str) -> dict[str, list[Subject]]:
    """Return the axioms that a transform does not preserve, with the subjects of which it takes them."""
    change = TRANSFORMS[transform]
    made = [(of_transform(change, METHODS[m]), METHODS[m]) for m in sorted(TRANSFORMED)]
    return {
        axiom: [s for s, spec in made if s is not None and axiom in spec.axioms and not law.applies(s)]
        for axiom, law in LAWS.items()
        if axiom not in change.preserves
    }


def page(text: str) -> str:
    """Return a page with its tables as they are now."""
    tables = {
        "methods": lambda: table(s for s in subjects() if not s.composite),
        "transforms": preserved,
        "rules": lambda: table(by_rule()),
    }
    for name, made in tables.items():
        before, mark, rest = text.partition(f"<!-- claims: {name} -->\n")
        if mark:
            text = before + mark + made() + rest[rest.index("<!-- end -->") :]
    return text


def find(progress: Callable[[str], None] = print) -> dict[str, dict[str, str]]:
    """Return a counterexample for everything that is not claimed; those that are stored and still hold stay."""
    before = stored()
    found: dict[str, dict[str, str]] = {}
    declared = [(s, unclaimed(s)) for s in subjects() if not s.composite]
    for subject, open_ones in [*declared, *((s, [*before.get(s.name, {})]) for s in by_rule())]:
        for axiom in open_ones:
            _keep(found, before, subject, axiom, progress)
    for transform in TRANSFORMS:
        for axiom, losers in lost(transform).items():
            seen = False
            for subject in losers:
                # One is enough, unless others are stored.
                if not seen or axiom in before.get(subject.name, {}):
                    seen |= _keep(found, before, subject, axiom, lambda _: None)
            if losers and not seen:
                progress(f"{transform} keeps {axiom} of {', '.join(s.name for s in losers)}: declare it")
    return found


def _keep(
    found: dict[str, dict[str, str]],
    before: dict[str, dict[str, str]],
    subject: Subject,
    axiom: str,
    progress: Callable[[str], None],
) -> bool:
    known = before.get(subject.name, {}).get(axiom)
    if known is None or not violated(subject, known):
        new = counterexample(subject, axiom)
        if isinstance(new, Verdict):
            progress(f"{subject.name} keeps {axiom}: {new}: claim it or widen the cases")
            return False
        known = new
    found.setdefault(subject.name, {})[axiom] = known
    return True


def main() -> int:
    """Write the counterexamples and the page."""
    STORE.write_text(json.dumps(find(), indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
