"""The command ``esegeta``. What a command needs is imported by that command: ``--help`` waits for nothing."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:
    text = f'esegeta: the command line needs {missing.name}. Install it: pip install "esegeta[cli]"'
    raise SystemExit(text) from None

from esegeta import __version__

_SEEN_FROM = 56  # voxels a side of a head in which the network of the demo finds the brain
BAD_INPUT, FAILED, UNDECIDED, INTERRUPTED = 2, 1, 3, 130

app = typer.Typer(
    name="esegeta",
    help="Explain what neural networks for 2-D and 3-D images do: attribution maps from a scan and a model.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# --- What is printed --------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """Print a line as it is."""
    from rich.console import Console

    Console(markup=False, highlight=False, emoji=False, soft_wrap=True).print(text)


def show(head: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table: with lines on a terminal, else in columns that other programs can cut."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head, title=title or None, title_justify="left")
        for row in cells:
            table.add_row(*row)
        Console(markup=False, highlight=False, emoji=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    if title:
        print(title)
    for row in [list(head), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size_of(count: int | None) -> str:
    """Return a number of bytes for people.

    >>> size_of(3 * 2**20), size_of(None)
    ('3 MiB', '-')
    """
    if count is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if unit == "GiB" else f"{count / size:.0f} {unit}"
    return f"{count} B"


_TRUST_HELP = (
    "Code that may run: a module, module:function, or a folder or file; several times for several. Without it: "
    "Python files in the folder of the configuration, and networks of known packages."
)
Trusted = Annotated[list[str] | None, typer.Option("--trust", metavar="NAME|FOLDER", help=_TRUST_HELP)]


# --- Commands ---------------------------------------------------------------------------------------------


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True)
    ] = False,
    traceback: Annotated[  # noqa: ARG001  read by main, wherever it stands
        bool, typer.Option("--traceback", help="Where an error comes from, in full.")
    ] = False,
) -> None:
    if version:
        print(f"esegeta {__version__}")
        raise typer.Exit


@app.command(epilog="Examples: [bold]esegeta demo[/bold] · [bold]esegeta demo --output my_demo --open[/bold]")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for everything.")] = Path(
        "esegeta_demo"
    ),
    size: Annotated[
        int,
        typer.Option(help="Voxels a side, a multiple of 8 from 40 to 128; below 56 little brain is found."),
    ] = 64,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes at once.")] = 2,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Let a trained brain-extraction network explain itself on a real head. Needs nothing; takes some minutes."""
    from esegeta.run.config import starter

    if size % 8 or not 40 <= size <= 128:
        raise typer.BadParameter(f"expected a multiple of 8 from 40 to 128, got {size}", param_hint="--size")
    say(
        f"A U-Net finds the brain in a head of {size} voxels a side; a dozen methods say why, and five metrics "
        f"judge them. Into {output}."
    )
    if size < _SEEN_FROM:
        say(
            f"Below {_SEEN_FROM} voxels a side the network misses most of the brain: a test, not a picture of it."
        )
    _execute(starter.demo(str(output.absolute()), size, workers), open_=open_)


@app.command(
    epilog="Examples: [bold]esegeta run config.toml --dry-run[/bold] · "
    "[bold]esegeta run config.toml --workers 4 --only grad_cam[/bold]"
)
def run(
    config: Annotated[Path, typer.Argument(help="A file .toml or .json; `esegeta init` writes one.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and cost; do nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Another folder than run.output.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Processes at once.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="The id of a method or of a job; several times for several."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep what is finished, or do everything again.")
    ] = True,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of bars.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    trust: Trusted = None,
) -> None:
    """Explain: every image, target and method of a configuration becomes a map, figures and a line of the report.

    A method that fails fails alone. Started again, a run does what is not done yet.
    """
    changes: dict[str, Any] = {}
    if output is not None:
        changes["output"] = str(output.absolute())
    if workers is not None:
        changes["workers"] = workers
    _execute(
        config, changes=changes, dry=dry_run, only=only, resume=resume, plain=plain, open_=open_, trust=trust
    )


@app.command(
    epilog="Examples: [bold]esegeta dissect config.toml[/bold] · "
    "[bold]esegeta dissect config.toml --output dissected --open[/bold]"
)
def dissect(
    config: Annotated[Path, typer.Argument(help="A file .toml or .json with a table [dissection].")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Another folder than run.output.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep what is finished, or do it again.")
    ] = True,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of bars.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    trust: Trusted = None,
) -> None:
    """Dissect a network: which channel of which layer sees which structure, over all images of a configuration.

    Of everything that the configuration asks for this is done alone; `esegeta run` does it with the rest.
    """
    from esegeta.run.config import loading as configuration
    from esegeta.run.jobs import dissection, plan

    changes: dict[str, Any] = {} if output is None else {"output": str(output.absolute())}
    found = configuration.load(config, run=changes, trust=trust or ())
    dissection.asked_of(found)
    _execute(
        config, changes=changes, only=["dissection"], resume=resume, plain=plain, open_=open_, trust=trust
    )
    record = plan.record_of(found.run.output, "dissection") or {}
    detectors = [row for row in record.get("rows") or () if row["detector"]]
    concepts = record.get("concepts") or ()
    say(f"{len(detectors)} detectors among {record.get('channels')} channels and {len(concepts)} concepts.")
    if detectors:
        head = ("place", "channel", "concept", "iou", "adjusted")
        show(head, [[_short(row[name]) for name in head] for row in detectors[:_MOST_ROWS]])


def _short(value: object) -> str:
    """Return a value for a cell of a printed table.

    >>> _short(0.123456), _short(None), _short(7)
    ('0.123', '-', '7')
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command(
    epilog="Examples: [bold]esegeta report results[/bold] · [bold]esegeta report results --open[/bold]"
)
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of bars.")] = False,
    trust: Trusted = None,
) -> None:
    """Draw the figures that a run of many maps has left out, and write its report. No map is computed."""
    from esegeta.run import pipeline

    summary = pipeline.draw(folder, trust=trust or (), progress=True if plain else None)
    _ended(summary, open_=open_)


def _execute(
    source: Any,
    *,
    changes: dict[str, Any] | None = None,
    dry: bool = False,
    only: list[str] | None = None,
    resume: bool = True,
    plain: bool = False,
    open_: bool = False,
    trust: list[str] | None = None,
) -> None:
    from esegeta.run import pipeline
    from esegeta.run.config import loading as configuration

    config = configuration.load(source, run=changes, trust=trust or ())
    summary = pipeline.run(
        config, resume=resume, dry=dry, only=only or None, progress=True if plain else None
    )
    if dry:
        _plan(summary, config.run.workers)
    else:
        _ended(summary, open_=open_)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)


_MOST_ROWS = 60


def _plan(summary: Any, workers: int) -> None:
    from esegeta.run import log, pipeline

    def columns(planned: Any) -> tuple[str, ...]:
        return (
            "done already" if planned.done else "to do",
            "the image decides" if planned.evaluations is None else f"{planned.evaluations} {planned.needs}",
            "?" if planned.seconds is None else log.roughly(planned.seconds),
            "x".join(map(str, planned.shape)) if planned.shape else "?",
            "?" if planned.memory is None else size_of(planned.memory),
        )

    looked = [planned for planned in summary.plan if planned.shape or planned.problem or planned.evaluations]
    if len(looked) <= _MOST_ROWS:
        head, rows = "job", [(planned.job.id, *columns(planned)) for planned in looked]
    else:  # those that differ in their subject alone in one line
        alike: dict[tuple[str, ...], int] = {}
        for planned in looked:
            what = f"{planned.job.target} {planned.job.method}"
            alike[what, *columns(planned)] = alike.get((what, *columns(planned)), 0) + 1
        head, rows = "jobs", [(f"{count} x {what}", *rest) for (what, *rest), count in alike.items()]
    show((head, "state", "at most", "about", "image", "memory of tensors"), rows)
    if len(looked) < len(summary.plan):
        kinds = sorted({planned.job.kind for planned in summary.plan if planned not in looked})
        say(f"And {len(summary.plan) - len(looked)} jobs that read these: {', '.join(kinds)}.")
    causes: dict[str, list[str]] = {}
    for planned in summary.plan:
        if planned.problem:
            causes.setdefault(planned.problem, []).append(planned.job.id)
    for problem, ids in causes.items():
        rest = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        say(f"{', '.join(ids[:3])}{rest}: {problem}")
    ahead = pipeline.forecast(summary, workers)
    if ahead.jobs:
        open_ = f", and {ahead.unknown} jobs of which only the image tells" if ahead.unknown else ""
        most = "" if ahead.memory is None else f" The largest job takes {size_of(ahead.memory)} of tensors."
        say(f"About {log.roughly(ahead.seconds)} with {workers} workers{open_}.{most}")
        say(f"At most {size_of(ahead.disk)} on disk, without figures; {size_of(ahead.free)} are free.")
    say(f"{len(summary.plan)} jobs. Nothing was written. Without --dry-run they go to {summary.folder}.")
    if causes:
        raise typer.Exit(FAILED)


def _ended(summary: Any, *, open_: bool) -> None:
    from esegeta.run.executors.status import MADE
    from esegeta.run.jobs import marks

    rows = [
        (
            record["id"],
            record["status"],
            f"{record['seconds']:.1f} s" if record.get("seconds") is not None else "-",
            size_of(record.get("peak_memory")),
        )
        for record in summary.records
    ]
    if rows:
        show(("job", "status", "time", "peak memory"), rows)
    for record in summary.records:
        said = marks.marks(record)
        if said:
            say(f"{record['id']}: {'; '.join(said)}")
        elif record["status"] not in MADE:
            say(f"{record['id']}: {record['status']}: {' '.join(str(record.get('error')).split())}")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.counts.items()))
    if summary.exit_code >= INTERRUPTED:
        say("Interrupted: what is finished is kept. The same command goes on with the rest.")
    say(f"{counts or 'Nothing was done'}. Everything is in {summary.folder}.")
    if summary.report is not None:
        say(f"Report: {summary.report}")
    if open_ and summary.report is not None:
        import webbrowser

        webbrowser.open(summary.report.absolute().as_uri())


@app.command(
    epilog="Examples: [bold]esegeta follow results[/bold] · "
    "[bold]esegeta follow results --cancel sub-01_lesion_rise[/bold] · "
    "[bold]esegeta follow results --cancel all[/bold]"
)
def follow(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, run.output.")],
    cancel: Annotated[
        list[str] | None,
        typer.Option("--cancel", metavar="ID|all", help="Give a job up; several times for several."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of bars.")] = False,
) -> None:
    """Look on while another process runs, or cancel its jobs: how many are done, have failed, and the time left."""
    from esegeta.run import log, pipeline

    if cancel:
        asked = pipeline.cancel(folder, cancel)
        say(f"Asked to be cancelled: {', '.join(asked)}.")
        return
    events, tally = pipeline.follow(folder), log.Tally()
    with log.display(True if plain else None) as shown:
        for event in events:
            tally.on_event(event)
            shown.show(event)
    how = (
        "The run has ended" if tally.ended else "The run has ended without saying so: start it again to go on"
    )
    say(f"{how}. {tally.line()}.")
    if tally.failed or tally.done < tally.total:
        raise typer.Exit(FAILED)


@app.command(
    epilog="Examples: [bold]esegeta clean results[/bold] · [bold]esegeta clean results --config a.toml --yes[/bold]"
)
def clean(
    folder: Annotated[Path, typer.Argument(help="The folder of runs, run.output.")],
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config", help="What shall stay; several times for several. Default: the last run there."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    trust: Trusted = None,
) -> None:
    """Remove from the folder of a run what its configuration does not know any more, after a list and a question.

    Only what runs have written there is touched.
    """
    from esegeta.run import pipeline
    from esegeta.run.config import loading as configuration

    if not (folder / ".jobs").is_dir():
        raise typer.BadParameter(f"expected the folder of a run, got {folder}", param_hint="FOLDER")
    given = config or [folder / "config.json"]
    known = [configuration.load(path, trust=trust or ()) for path in given]

    def agreed(files: list[Path]) -> bool:
        whole = sum(path.stat().st_size for path in files)
        for path in files:
            say(os.path.relpath(path, folder))
        say(f"{len(files)} files, {size_of(whole)}, that {' and '.join(map(str, given))} does not know.")
        return yes or typer.confirm("Remove them?", default=False)

    removed = pipeline.clean(folder, known, agreed)
    say(f"Removed {len(removed)} files." if removed else "Nothing was removed.")


@app.command(epilog="Examples: [bold]esegeta init[/bold] · [bold]esegeta init knee.toml[/bold]")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write, .toml.")] = Path("esegeta.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a configuration with comments, which runs as it is: a place to begin."""
    from esegeta.run.config import starter

    if path.suffix != ".toml":
        raise typer.BadParameter(f"expected a name that ends in .toml, got {path}", param_hint="PATH")
    try:
        starter.write(path, force)
    except FileExistsError:
        raise typer.BadParameter(f"{path} is there already; --force replaces it", param_hint="PATH") from None
    say(f"Wrote {path}. Look at the plan: esegeta run {path} --dry-run")


@app.command(
    epilog="Examples: [bold]esegeta methods[/bold] · [bold]esegeta methods integrated_gradients[/bold] · "
    "[bold]esegeta methods smooth[/bold] · [bold]esegeta methods --plugins my_methods.py[/bold]"
)
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="A method, transform, reducer, baseline, metric or kind of jobs."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A configuration, whose plugins are listed too.")
    ] = None,
    plugins: Annotated[
        list[Path] | None,
        typer.Option("--plugins", help="A Python file that registers methods; several times for several."),
    ] = None,
    trust: Trusted = None,
) -> None:
    """List what a configuration can name: methods, transforms, reducers, baselines, kinds of jobs, and parameters."""
    from esegeta.run.config import listing

    if config is not None or plugins:
        _register(config, plugins or [], trust or [])
    if name is not None:
        say(listing.entry(name))
        return
    for title, head, rows in listing.tables():
        show(head, rows, title)
        say()
    say("esegeta methods NAME says more about one of them.")


def _register(config: Path | None, plugins: list[Path], trust: list[str]) -> None:
    """Import the plugins of a configuration, if they are trusted, and those that stand on the command line."""
    from esegeta.run.config import loading as configuration
    from esegeta.run.config.plugins import load
    from esegeta.run.config.trust import asked

    if config is not None:
        configuration.plugins_of(config, trust=trust)
    for path in plugins:
        if not path.is_file():
            raise typer.BadParameter(f"expected a file, got {path}", param_hint="--plugins")
        load([path], asked(path.absolute().parent, [str(path.absolute().parent), *trust]))


@app.command(
    epilog="Examples: [bold]esegeta convert cfg_Misc_Seg_3d.json -o seg.toml[/bold] · "
    "[bold]esegeta convert cfg_Misc_Class_2d.json[/bold]"
)
def convert(
    source: Annotated[Path, typer.Argument(help="A JSON file of TorchEsegeta.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write, .toml; without it the text is printed."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Translate a configuration of TorchEsegeta, and say what was changed and what has no counterpart."""
    from esegeta.run.config import convert as conversion

    if output is not None and output.suffix != ".toml":
        expected = f"expected a name that ends in .toml, got {output}"
        raise typer.BadParameter(expected, param_hint="--output")
    done = conversion.convert(conversion.read(source))
    if output is None:
        print(done.text, end="")
    elif output.exists() and not force:
        raise typer.BadParameter(f"{output} is there already; --force replaces it", param_hint="--output")
    else:
        output.write_text(done.text, encoding="utf-8")
        print(f"Wrote {output}.", file=sys.stderr)
    for line in done.notes:
        print(line, file=sys.stderr)


@app.command(
    epilog="Examples: [bold]esegeta places zoo:brain_extraction_unet --shape 1,64,64,64[/bold] · "
    "[bold]esegeta places config.toml --shape 1,64,64,64[/bold]"
)
def places(
    model: Annotated[
        str,
        typer.Argument(
            help="A configuration, or a model as in model.source: zoo:NAME, module:factory, a file."
        ),
    ],
    shape: Annotated[str, typer.Option("--shape", help="Of one image: channels and sizes, 1,64,64,64.")],
    weights: Annotated[str | None, typer.Option("--weights", help="A file of weights.")] = None,
    arguments: Annotated[
        str, typer.Option("--arguments", help="Of the factory, in JSON: '{\"classes\": 3}'.")
    ] = "{}",
    cuts: Annotated[
        bool, typer.Option("--cuts", help="Only those that all the way from image to output leads through.")
    ] = False,
    trust: Trusted = None,
) -> None:
    """List the places inside a model: where a class activation map or a layer method can look."""
    import torch

    from esegeta.placing import places as found_in
    from esegeta.run.config import loading as configuration
    from esegeta.run.config import sources as networks
    from esegeta.run.config.trust import NAME, asked, of_environment

    sizes = _sizes(shape)
    if Path(model).suffix in (".toml", ".json"):
        section, allowed = configuration.model_of(model, trust=trust or ())
    else:
        try:
            given = json.loads(arguments)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise typer.BadParameter(f"expected a table in JSON, got {arguments}", param_hint="--arguments")
        section = configuration.Model(source=model, weights=weights, arguments=given, path=str(Path.cwd()))
        # What stands on the command line was chosen by whoever typed it.
        typed = [model] if NAME.fullmatch(model) or Path(model).exists() else []
        allowed = asked(Path.cwd(), [*of_environment(), *(trust or ()), *typed])
    network = networks.load(section, trust=allowed)
    try:
        answer = network(torch.zeros(sizes))
    except RuntimeError as error:
        raise typer.BadParameter(
            f"expected a shape that the model takes, got {shape}: {error}", param_hint="--shape"
        ) from error
    say(f"{model}: from {tuple(sizes)} to {tuple(answer.shape)}")
    found = found_in(network, torch.rand(sizes, generator=torch.Generator().manual_seed(0)))
    rows = [
        (p.name, p.kind, "x".join(map(str, p.shape)), "yes" if p.cut else "no", ", ".join(p.beside))
        for p in found
        if p.used and not p.same_as and (p.cut or not cuts)
    ]
    show(("place", "kind", "shape", "cut", "beside it"), rows)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= 4 or any(size < 1 for size in sizes):
        expected = "channels and one to three sizes, for example 1,64,64,64"
        raise typer.BadParameter(f"expected {expected}, got {text}", param_hint="--shape")
    return sizes


@app.command(
    epilog="Examples: [bold]esegeta verify integrated_gradients --axioms completeness,dummy[/bold] · "
    "[bold]esegeta verify captum:DeepLift --seconds 60 --json report.json[/bold]"
)
def verify(
    name: Annotated[
        str,
        typer.Argument(help="A method, or another library's, such as captum:DeepLift; smooth, rules.guided."),
    ],
    axioms: Annotated[
        str | None, typer.Option("--axioms", help="Names with commas between them; without it all.")
    ] = None,
    cases: Annotated[int, typer.Option("--cases", min=1, help="Random cases for each axiom.")] = 100,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="End after that, undecided.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random cases.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Put a method to random networks and images: which axioms does it keep, and where does it break them?

    Also a transform, a reducer or a rewrite. Status 1: something that is claimed does not hold. 3: too few cases, or
    too little time, to decide everything.
    """
    from esegeta.conformance.verify import verify as verified

    chosen = None if axioms is None else [axiom.strip() for axiom in axioms.split(",")]
    report = verified(name, axioms=chosen, cases=cases, seconds=seconds, seed=seed)
    say(str(report))
    if json_ is not None:
        json_.write_text(report.json(), encoding="utf-8")
    if report.broken or report.undecided:
        raise typer.Exit(FAILED if report.broken else UNDECIDED)


@app.command(
    epilog="Examples: [bold]esegeta compare results_before results_after[/bold] · "
    "[bold]esegeta compare a b --csv differences.csv --json differences.json[/bold]"
)
def compare(
    first: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    second: Annotated[Path, typer.Argument(help="The folder of another one.")],
    csv: Annotated[Path | None, typer.Option("--csv", help="Write one tidy table there as well.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything there as well.")] = None,
    key: Annotated[int, typer.Option("--key", help="Of the draws of the bootstrap.")] = 0,
) -> None:
    """Put two finished runs beside each other: how alike their maps are, and by how much metrics differ.

    What has the same subject, target and method in both belongs together. Differences are of the second less the
    first, in pairs over subjects, with intervals and Holm's correction. Nothing is computed again.
    """
    from esegeta.run import comparison

    found = comparison.compare(first, second, key=key)
    say(str(found))
    for path, text in ((csv, found.csv), (json_, found.json)):
        if path is not None:
            path.write_text(text(), encoding="utf-8")


@app.command(
    name="app",
    epilog="Examples: [bold]esegeta app[/bold] · [bold]esegeta app study --browse /data[/bold] · "
    "[bold]esegeta app results[/bold]",
)
def page(
    folder: Annotated[
        Path, typer.Argument(help="Where the configuration is kept; the folder of a run shows that.")
    ] = Path("."),
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Of this machine; 0 for any.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open none.")] = False,
    browse: Annotated[
        list[Path] | None,
        typer.Option("--browse", help="A further folder that the page may read; several times for several."),
    ] = None,
    base_url: Annotated[
        str, typer.Option("--base-url", help="The path or address under which a proxy shows the page.")
    ] = "/",
    trust: Trusted = None,
) -> None:
    """Open a page in the browser: choose a network and images, methods and their parameters, run, look at the maps.

    It answers this machine alone and asks no other one for anything. What the page shows is a configuration in the
    folder, app.toml, which `esegeta run` takes as well.
    """
    from esegeta.app import launch, server

    if not folder.is_dir():
        folder.mkdir(parents=True)
    site = server.site_of(
        folder, trust_given=tuple(trust or ()), browse=tuple(browse or ()), base_url=base_url
    )
    launch.serve(site, port, browser=not no_browser, say=say)


# --- The way in and out -----------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """Return what went wrong, on one line."""
    from esegeta.engine import refusals

    text = refusals.one_line(error)
    return (
        text
        if text and isinstance(error, (ValueError, OSError))
        else f"{type(error).__name__}: {text}".rstrip(": ")
    )


def ended_by(error: BaseException) -> int:
    """Say on stderr why it ends, and with which exit status."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        print("esegeta: interrupted. What is finished is kept.", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    if hasattr(error, "format_message"):  # of typer, about what stands on the command line
        print(f"esegeta: {' '.join(error.format_message().split())}", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, BrokenPipeError):  # whoever read what we print has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, ModuleNotFoundError):
        print(f"esegeta: this needs {error.name}. {_extra(error.name)}", file=sys.stderr)
        return FAILED
    for line in getattr(error, "faults", None) or [one_line(error)]:
        print(f"esegeta: {line}", file=sys.stderr)
    asked_wrongly = isinstance(error, (ValueError, TypeError, FileNotFoundError, IsADirectoryError))
    return BAD_INPUT if asked_wrongly else FAILED


def _extra(module: str | None) -> str:
    top = (module or "").partition(".")[0]
    extras = {
        "starlette": "gui",
        "uvicorn": "gui",
        "pydantic": "cli",
        "matplotlib": "viz",
        "jinja2": "viz",
        "hypothesis": "verify",
    }
    return f'Install it: pip install "esegeta[{extras[top]}]"' if top in extras else "Install it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Errors are one line on stderr: status 2 for what was asked wrongly, 1 for what failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    in_full = "--traceback" in given
    command = typer.main.get_command(app)
    try:
        words = [word for word in given if word != "--traceback"] or ["--help"]
        status = command.main(words, "esegeta", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if in_full and isinstance(error, Exception):
            raise
        return ended_by(error)
