"""The page of the documentation: every number on it comes from the file of ratios, and every figure."""

from collections.abc import Sequence
from pathlib import Path

from _questions import Content, Question, Row, rows

DOCS = Path(__file__).parents[1] / "docs"

HEAD = """# Benchmarks

How fast the methods are beside other libraries, how close to what the network alone takes, how time and memory grow,
and what accuracy an evaluation buys. All numbers are ratios of what was measured side by side in one run; seconds of
one machine mean nothing on another. The page and its figures are written by

```sh
python -m benchmarks --write          # measure everything, and write this page and benchmarks/ratios.json
python -m benchmarks peers --only resnet,Grad-CAM --write   # only some rows
python -m benchmarks --check          # measure, and say what has moved since
python -m benchmarks --quick          # does it run? small networks, two rounds
```

An aim that is not met is marked !. More claims, one script each, are in `benchmarks/README.md`.
"""


def text(content: Content, questions: Sequence[Question]) -> str:
    """Return the page in markdown."""
    parts = [HEAD]
    for question in questions:
        if question.name in content:
            parts.append(section(content, question))
    return "\n".join(parts)


def section(content: Content, question: Question) -> str:
    """Return the section of one question: its words, its setting, its figure, a table for each group."""
    made = content[question.name]["setting"]
    found = rows(content, question.name)
    threads = "one thread" if made["threads"] == 1 else f"{made['threads']} threads"
    small = ", small networks and few rounds" if made["quick"] else ""
    lines = [
        f"## {question.title}\n",
        f"{question.text}\n",
        f"Measured with {threads}, torch {made['torch']}{small}.\n",
        f"![{question.title}](images/benchmarks_{question.name}.png)\n",
    ]
    for group in dict.fromkeys(row.group for row in found):
        lines.append(markdown(group, [row for row in found if row.group == group]))
    return "\n".join(lines)


def columns(found: Sequence[Row]) -> list[str]:
    """Return the names of all values, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in found for name in row.values))


def cells(row: Row, names: Sequence[str]) -> list[str]:
    """Return the cells of a row: values, aim, note."""
    values = [number(row.values[name]) if name in row.values else "-" for name in names]
    aim = ""
    if row.aim is not None:
        aim = f"{row.aim.sign} {row.aim.bound:g}" + ("" if row.aim.met(row.values) else " !")
    return [*values, aim, row.note]


def number(value: float) -> str:
    """Two decimals, or an exponent for what is small or large."""
    return f"{value:.2f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.0e}"


def markdown(group: str, found: Sequence[Row]) -> str:
    """Return one table."""
    names = columns(found)
    head = [group, *names, "aim", ""]
    lines = [head, ["---"] * len(head), *([row.what, *cells(row, names)] for row in found)]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"
    )


def write(content: Content, questions: Sequence[Question], docs: Path = DOCS) -> None:
    """Write the page and its figures."""
    from esegeta import plot

    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(text(content, questions))
    for question in questions:
        if question.name in content:
            file = docs / "images" / f"benchmarks_{question.name}.png"
            plot.save(question.draw(rows(content, question.name)), file, colours=64)
