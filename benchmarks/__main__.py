"""Measure what the documentation says about speed, memory and accuracy: one command, a file for each question.

    python -m benchmarks                       everything, as tables
    python -m benchmarks peers limit           some questions
    python -m benchmarks --only resnet         rows whose name, "network: method", contains one of the words
    python -m benchmarks --quick               small and few, to see whether it runs
    python -m benchmarks --write               keep the ratios, write docs/benchmarks.md and its figures
    python -m benchmarks --check               compare with the ratios that were kept; exit status 1 if one moved
    python -m benchmarks --page                write the page anew, without measuring

OMP_NUM_THREADS sets the number of threads. Nothing else should run on the machine; processor time is what counts in
the tables, because it is disturbed least where something does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _page
import _questions
import accuracy
import limit
import peers
import scaling
from _measure import done
from _questions import Content, Moved, Options, Question, Row

QUESTIONS = (peers.QUESTION, limit.QUESTION, scaling.QUESTION, accuracy.QUESTION)


def arguments(asked: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [question.name for question in QUESTIONS]
    parser.add_argument(
        "questions", nargs="*", metavar="question", help=f"of {', '.join(names)}; by default all"
    )
    parser.add_argument("--quick", action="store_true", help="small and few, to see whether it runs")
    parser.add_argument("--only", default="", help="rows whose name contains one of these words, with commas")
    parser.add_argument("--repeats", type=int, help="rounds (default 5, with --quick 2)")
    parser.add_argument("--check", action="store_true", help="compare with the ratios that were kept")
    parser.add_argument("--write", action="store_true", help="keep the ratios and write the page")
    parser.add_argument("--page", action="store_true", help="write the page from the ratios that were kept")
    parser.add_argument("--file", type=Path, default=_questions.FILE, help="where ratios are kept")
    parser.add_argument("--docs", type=Path, default=_page.DOCS, help="the folder of the page")
    options = parser.parse_args(asked)
    unknown = [name for name in options.questions if name not in names]
    if unknown:
        parser.error(f"question: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    return options


def main(asked: Sequence[str] | None = None) -> int:
    """Measure, show, and keep or compare; return the exit status."""
    options = arguments(asked)
    content = _questions.read(options.file)
    if options.page:
        _page.write(content, QUESTIONS, options.docs)
        return 0
    wanted = Options(
        quick=options.quick,
        rounds=options.repeats or (2 if options.quick else 5),
        only=tuple(filter(None, options.only.split(","))),
    )
    made, moved = _questions.setting(wanted), []
    for question in QUESTIONS:
        if options.questions and question.name not in options.questions:
            continue
        if options.check:
            _questions.moved(question, content, made, [])  # refuses before anything is measured
        found: list[Row] = []
        for row in question.measure(wanted):
            found.append(row)
            if options.write:  # after every row: a run of an hour may be stopped
                content = _questions.merged(content, question.name, made, [row])
                _questions.write(content, options.file)
        done()
        show(question, found)
        if options.check:
            moved += _questions.moved(question, content, made, found)
    if options.write:
        _page.write(content, QUESTIONS, options.docs)
    return report(moved, content, made) if options.check else 0


def show(question: Question, found: Sequence[Row]) -> None:
    """Print a table for each group."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for group in dict.fromkeys(row.group for row in found):
        these = [row for row in found if row.group == group]
        names = _page.columns(these)
        table = Table(title=f"{question.name}: {group}", title_justify="left")
        table.add_column("")
        for name in (*names, "aim"):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in these:
            met = row.aim is None or row.aim.met(row.values)
            table.add_row(row.what, *_page.cells(row, names), style=None if met else "red")
        console.print(table)


def report(moved: Sequence[Moved], content: Content, made: dict[str, object]) -> int:
    """Say what has moved; return 1 if something has."""
    versions = {part["setting"]["torch"] for part in content.values()}
    if versions != {made["torch"]}:
        print(f"kept with torch {', '.join(sorted(versions))}, measured with {made['torch']}")
    for one in moved:
        print(one)
    print(f"{len(moved)} moved" if moved else "nothing has moved")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
