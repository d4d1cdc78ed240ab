"""What a verification found: one verdict for every axiom, as text, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from esegeta.axioms import AXIOMS

Kind = Literal["holds", "violated", "undecided", "not applicable"]
# Without so many cases that could have failed nothing is said to hold.
ENOUGH = 25


@dataclass(frozen=True)
class Counterexample:
    """Where an axiom fails: the situation as the call that rebuilds it, what remains there, what rounding allows."""

    code: str
    residual: float
    allowed: float


@dataclass(frozen=True)
class Verdict:
    """What was found about one axiom.

    kind: "undecided" if nothing was found in too few cases or in too little time; cases: how many were put to it
    that could have failed; refused: how many of them it did not accept, ``why`` says for which reason, or why there
    is no verdict; claimed: whether the method claims the axiom.
    """

    axiom: str
    kind: Kind
    cases: int = 0
    refused: int = 0
    claimed: bool = False
    why: str = ""
    counterexample: Counterexample | None = None

    @property
    def broken(self) -> bool:
        """A claim that does not hold, or that nothing can be said about."""
        return self.claimed and self.kind in ("violated", "not applicable")

    def __str__(self) -> str:
        claim = {True: "claimed", False: ""}[self.claimed]
        if self.kind == "holds":
            rest = f"on {self.cases} cases" + (
                f"; {self.refused} refused: {self.why}" if self.refused else ""
            )
        elif self.counterexample is None:
            rest = self.why
        else:
            found = self.counterexample
            by = f", {self.why}" if self.why.startswith("by ") else ""
            rest = f"{found.residual:.3g} where rounding allows {found.allowed:.2g}{by}\n    {found.code}"
        return f"{self.axiom:<26}{self.kind:<15}{claim:<9}{rest}".rstrip()


@dataclass(frozen=True)
class Report:
    """The verdicts on one method. ``complete`` is False if the time was over before all cases were tried."""

    method: str
    verdicts: tuple[Verdict, ...]
    seconds: float = 0.0
    complete: bool = True

    def __getitem__(self, axiom: str) -> Verdict:
        for verdict in self.verdicts:
            if verdict.axiom == axiom:
                return verdict
        raise KeyError(
            f"{axiom}: the report on {self.method} is about {', '.join(v.axiom for v in self.verdicts)}"
        )

    @property
    def axioms(self) -> frozenset[str]:
        """The axioms that hold on every case."""
        return frozenset(v.axiom for v in self.verdicts if v.kind == "holds")

    @property
    def broken(self) -> tuple[str, ...]:
        """Claims that do not hold."""
        return tuple(v.axiom for v in self.verdicts if v.broken)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Axioms of which too few cases were tried to say anything."""
        return tuple(v.axiom for v in self.verdicts if v.kind == "undecided")

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Return text for a terminal: a line for each axiom, and below it the code of a counterexample."""
        end = "" if self.complete else ", stopped before all cases were tried"
        open_ones = f", {len(self.undecided)} undecided" if self.undecided else ""
        what = "axioms" if all(v.axiom in AXIOMS for v in self.verdicts) else "laws"
        head = f"{self.method}: {len(self.axioms)} of {len(self.verdicts)} {what} hold{open_ones}{end}"
        return "\n".join([head, "", *(str(v) for v in self.verdicts)])

    def table(self) -> str:
        """Return a Markdown table."""
        rows = [
            f"| {v.axiom} | {v.kind} | {'yes' if v.claimed else ''} | {_cell(v)} |" for v in self.verdicts
        ]
        return "\n".join(["| axiom | verdict | claimed | |", "| --- | --- | --- | --- |", *rows])

    def json(self) -> str:
        """Return JSON, which ``Report.from_json`` reads."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Return the report that ``json`` wrote."""
        told = json.loads(text)
        found = lambda v: Counterexample(**v) if v else None
        verdicts = tuple(
            Verdict(**{**v, "counterexample": found(v["counterexample"])}) for v in told["verdicts"]
        )
        return cls(**{**told, "verdicts": verdicts})


def _cell(verdict: Verdict) -> str:
    if verdict.kind == "holds":
        return f"{verdict.cases} cases"
    if verdict.counterexample is None:
        return verdict.why.replace("|", r"\|")
    code = verdict.counterexample.code.replace("|", r"\|")
    return f"{verdict.counterexample.residual:.3g} at `{code}`"
