"""The kinds of jobs "metrics", "metrics_mean" and "metrics_curves": is a map any good?

``[[metrics]]`` in a configuration asks for them. Every map of the run is put to every metric: the map that is there
is read, not computed again. What cannot be said of a map is missing, with its reason.
"""

import inspect
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from esegeta._registry import METRICS, MetricSpec, find_method
from esegeta.engine import check
from esegeta.engine.execution import DeadlineExceeded, execution
from esegeta.metrics.comparing import interval
from esegeta.metrics.explanations import doubts
from esegeta.run.config import building, catalogue
from esegeta.run.config.faults import Strict, nearest
from esegeta.run.config.schema import Call, Section
from esegeta.run.config.tables import id_and_limits, no_twins, with_files
from esegeta.run.executors.child import Context
from esegeta.run.executors.status import Status
from esegeta.run.jobs import judging, marks, outputs
from esegeta.run.jobs.inputs import Inputs
from esegeta.run.jobs.judging import Answer, Material
from esegeta.run.jobs.kinds import Beside, Job, Kind, Record, register
from esegeta.run.jobs.methods import METHODS, number
from esegeta.run.jobs.plan import Planning, contents, ended, limits, releases, tables_of
from esegeta.run.jobs.plan import header as plan_header
from esegeta.run.volumes import files, labels, names

TABLE = "metrics"
FOLDER = "metrics"  # where curves and their figures are, in the folder of the run
PREDICTION, REFERENCE = "prediction", "reference"
DRAWS = 99  # of random maps: p to a hundredth
NULL = ("null_mean", "null_low", "null_high", "p")


class Metric(Section):
    """A metric of every map.

    metric: its name; id: names the entry, for a second one of the same metric; parameters: of the metric. methods,
    targets: which maps are judged, by the ids of methods and the names of targets; all by default. mask: for metrics
    of where a map lies, "reference", "prediction", or the files of masks, a pattern; within: the same for the voxels
    that count at all. baseline: what takes the place of parts that are removed. null: random maps, next to which the
    number is put; draws: how many, 99 by default; better: which way, if the metric does not say.
    """

    metric: str
    id: str | None = None
    title: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    methods: list[str] | None = None
    targets: list[str] | None = None
    mask: str | None = None
    within: str | None = None
    baseline: str | Call | None = None
    null: str | Call | None = None
    draws: int | None = None
    better: Literal["higher", "lower"] | None = None
    deadline: float | None = None
    memory: str | int | None = None

    @property
    def own(self) -> str:
        """Return what the entry is called."""
        return self.id or self.metric

    @property
    def random_maps(self) -> int:
        """Return how many random maps each map stands beside."""
        return 0 if self.null is None else DRAWS if self.draws is None else self.draws

    def placed(self, place: Callable[[str], str]) -> "Metric":
        """Return the same with patterns of files from anywhere."""

        def whole(given: str | None) -> str | None:
            return given if given in (None, PREDICTION, REFERENCE) else place(str(given))

        return self.model_copy(update={"mask": whole(self.mask), "within": whole(self.within)})


# ------------------------------------------------------------------ the table of a configuration


def settings(spec: MetricSpec) -> dict[str, catalogue.Parameter]:
    """Return the parameters of a metric that a file can set.

    >>> list(settings(METRICS["sensitivity_n"]))
    ['n', 'samples', 'features', 'fill']
    """
    known = {
        name: parameter._replace(default=None) if name == "other" else parameter
        for name, parameter in catalogue.of_method(spec).items()
        if name not in judging.GIVEN or name == "other"
    }
    return {name: p for name, p in known.items() if catalogue.settable(p)}


def check_table(table: Metric, path: str, faults: Strict) -> None:
    """Tell what is wrong with an entry, as far as the entry alone shows it."""
    context = catalogue.checking(faults)
    id_and_limits(table, path, faults)
    if table.baseline is not None:
        building.baselines(table.baseline, f"{path}.baseline", None, context)
    spec = catalogue.found(METRICS, table.metric, f"{path}.metric", faults)
    if spec is None:
        return
    given = catalogue.arguments(table.parameters, settings(spec), context, f"{path}.parameters", spec.name)
    if given is not None and catalogue.complete(given):
        _try(table, spec, given, path, faults)
    takes_mask = "mask" in spec.needs
    if takes_mask and table.mask is None:
        expected = f'"{PREDICTION}", "{REFERENCE}" or a pattern of files'
        faults.add(f"{path}.mask", expected, "nothing", f"{spec.name} says where a map lies")
    if not takes_mask and table.mask is not None:
        faults.add(f"{path}.mask", f"none for {spec.name}", repr(table.mask), "Leave it out")
    for key in ("mask", "within"):
        value = getattr(table, key)
        if value is not None and not value.strip():
            faults.add(f"{path}.{key}", "the name of a mask", "an empty text", "Leave it out or fill it in")
    _check_null(table, spec, path, faults)


def _stand_in(x: Tensor) -> Tensor:
    return x


def _try(table: Metric, spec: MetricSpec, given: Mapping[str, Any], path: str, faults: Strict) -> None:
    """Make the metric once, of stand-ins: it looks at its settings before it sees an image."""
    if table.baseline is not None and not removes(spec):
        got, advice = repr(_json(table.baseline)), "It removes no parts of the image: leave it out"
        faults.add(f"{path}.baseline", f"none for {spec.name}", got, advice)
    stand_ins: dict[str, Any] = {
        "explain": _stand_in,
        "score": torch.sum,
        "model": _stand_in,
        "module": torch.nn.Linear(1, 1),
        "method": lambda model: model,
        "explain_of": lambda number: _stand_in,  # noqa: ARG005
        "target": 1,
        "other": 0,
    }
    rest = dict(given)
    lead = judging.leading(spec.fn)
    own = [rest.pop(name) if name in rest else stand_ins.get(name) for name in lead]
    if spec.name == "infidelity":
        rest.setdefault("multiplied", True)
    with faults.at(f"{path}.parameters"):
        measure = spec.fn(*own, **rest)
        if table.within is not None and "within" not in inspect.signature(measure).parameters:
            faults.add(f"{path}.within", f"none for {spec.name}", repr(table.within), "Leave it out")


def removes(spec: MetricSpec) -> bool:
    """Return whether a metric puts a baseline in the place of parts of the image."""
    return "score" in spec.needs and "explain" not in spec.needs


def _check_null(table: Metric, spec: MetricSpec, path: str, faults: Strict) -> None:
    if table.null is None:
        for key in ("better", "draws"):
            if getattr(table, key) is not None:
                advice = 'Add for example null = "surrogate", or leave it out'
                faults.add(f"{path}.{key}", "nothing without null", str(getattr(table, key)), advice)
        return
    call = Call(name=table.null) if isinstance(table.null, str) else table.null
    makers = catalogue.family("null")
    if call.name not in makers:
        faults.add(f"{path}.null", "a null model", repr(call.name), nearest(call.name, makers))
    else:
        null = makers[call.name].parameters
        catalogue.arguments(call.parameters, null, catalogue.checking(faults), f"{path}.null", call.name)
    if "explain" in spec.needs:
        got, advice = repr(call.name), "Leave it out: random maps cannot be asked about other images"
        faults.add(f"{path}.null", f"none for {spec.name}", got, advice)
    elif not spec.better and table.better is None:
        got = f"nothing, and {spec.name} is better neither way"
        faults.add(f"{path}.better", '"higher" or "lower"', got, "Say which, or leave out null")
    if table.random_maps < 1:
        faults.add(f"{path}.draws", "a whole number >= 1", str(table.draws), "99 gives p to a hundredth")


def check_all(tables: Sequence[tuple[str, Metric]], beside: Beside, faults: Strict) -> None:
    """Tell what is wrong with entries beside the rest of the configuration."""
    no_twins([(path, [table.own]) for path, table in tables], "id", faults, names.alike)
    taken = {names.alike(name) for name in METHODS.columns}
    for path, table in tables:
        if names.alike(table.own) in taken:
            advice = "The table of maps has a column of that name"
            faults.add(f"{path}.id", "a name of its own", repr(table.own), advice)
        for key, there in (("methods", beside.methods), ("targets", beside.targets)):
            asked = getattr(table, key)
            if asked is not None and not asked:
                faults.add(f"{path}.{key}", f"at least one of the {key}", "none", "Leave it out for all")
            for name in asked or ():
                if name not in there:
                    what = "the id of a method" if key == "methods" else "the name of a target"
                    faults.add(f"{path}.{key}", f"{what} of this file", repr(name), nearest(name, there))
        for key in ("mask", "within"):
            if getattr(table, key) == REFERENCE and not beside.reference:
                advice = "Add [reference] with the files of the label maps"
                faults.add(f"{path}.{key}", "label maps in [reference]", "no such table", advice)


# ------------------------------------------------------------------ plan


def masks_of(given: str | None, planning: Planning) -> dict[str, Path]:
    """Return the file of each subject that has one, for a mask that is in files.

    ``{subject}`` in a pattern stands for the subject, ``sub-01``; without it the names of files tell the subject.
    """
    if given is None or given in (PREDICTION, REFERENCE):
        return {}
    subjects = [image.subject for image in planning.images]
    if "{subject}" not in given:
        return labels.matched(given, subjects, planning.config.input.subject)
    found = {}
    for subject in subjects:
        pattern = given.replace("{subject}", subject)
        try:
            several = files.glob(pattern)
        except files.UnreadableInput:
            continue
        if len(several) > 1:
            got = f"{several[0].name} and {several[1].name}"
            text = check.problem(TABLE, f"one mask for {subject}", got, "Narrow the pattern")
            raise files.UnreadableInput(text)
        found[subject] = several[0]
    return found


def entries(planning: Planning) -> list[Job]:
    """Return a job for each map and each metric that judges it."""
    how = [
        (
            table,
            METRICS.by_name[table.metric],
            {key: masks_of(getattr(table, key), planning) for key in ("mask", "within")},
        )
        for table in tables_of(planning.config, TABLE, Metric)
    ]
    return [
        _job(planning, job, table, spec, masks)
        for job in planning.jobs
        if job.kind == "methods"
        for table, spec, masks in how
        if (table.methods is None or job.method in table.methods)
        and (table.targets is None or job.target in table.targets)
    ]


def _job(
    planning: Planning, of: Job, table: Metric, spec: MetricSpec, masks: Mapping[str, Mapping[str, Path]]
) -> Job:
    config = planning.config
    given = table.model_dump(mode="json")
    if removes(spec) and table.baseline is None and _is_one(config.run.baseline):
        given["baseline"] = _json(config.run.baseline)
    where = {key: masks[key].get(of.subject) for key in masks}
    decides: Record = {
        "metric": spec.name,
        "parameters": with_files(table.parameters, contents),
        **{key: given[key] for key in ("mask", "within", "baseline", "null", "better")},
        "draws": table.random_maps,
        "versions": releases(),
    }
    for key in ("mask", "within"):
        if decides[key] not in (None, PREDICTION, REFERENCE):
            decides[key] = "file"

    def decided() -> Record:  # when it is the job's turn: masks are read then
        contains = {key: None if path is None else contents(path) for key, path in where.items()}
        reference = of.given.get("reference") if REFERENCE in (table.mask, table.within) else None
        about = reference() if callable(reference) else reference
        return {**decides, "files": contains, "reference": about and about["decides"]}

    return Job(
        id=f"{of.id}_{names.label(table.own)}",
        kind="metrics",
        keys={**of.keys, "metric": table.own},
        given={
            **of.given,
            "of": of.id,
            "title": table.title or table.own.replace("_", " "),
            "metric": {**given, "metric": spec.name},
            "masks": {key: None if path is None else str(path) for key, path in where.items()},
        },
        decides=decided,
        looks=table.title,
        after=(of,),
        **limits(table, config.run),
    )


def _is_one(given: Any) -> bool:
    """Return whether a baseline is there, and one image."""
    calls = given if isinstance(given, list) else [] if given is None else [given]
    return len(calls) == 1 and (isinstance(calls[0], str) or calls[0].parameters.get("count", 1) == 1)


def _json(given: Any) -> Any:
    one = given[0] if isinstance(given, list) else given
    return one.model_dump(mode="json") if isinstance(one, Call) else one


def cost(payload: Record) -> tuple[int | None, str]:
    """Return how many gradients or values of the score a metric takes, and which of them."""
    section = Metric.model_validate(payload["metric"])
    spec = METRICS[section.metric]
    own = spec.cost(**section.parameters)
    times = 1 if spec.answer == "sampled" else 1 + section.random_maps  # samples are those of all maps
    if "explain" not in spec.needs:
        return None if own.forwards is None else own.forwards * times, "values"
    method = find_method(payload["method"]["name"])
    each = catalogue.cost(method, payload["method"])
    needs = "gradients" if method.needs == "gradient" else "values"
    return None if each is None or own.explanations is None else each * own.explanations, needs


def header(payload: Record) -> Record:
    """Return what a record says whatever comes of the job."""
    section = payload["metric"]
    spec = METRICS.get(section["metric"])
    return {
        **plan_header(payload),
        "name": section["metric"],
        "better": section["better"] or (spec.better if spec else "") or None,
        "of": payload["of"],
        "asked": {k: v for k, v in section.items() if v is not None and k not in ("id", "title", "metric")},
    }


# ------------------------------------------------------------------ work


def mask_of(key: str, section: Metric, payload: Record, material: Material) -> Tensor | None:
    """Return a mask on the grid of the network."""
    given = getattr(section, key)
    if given is None:
        return None
    image, inputs = material.image, material.inputs
    if given in (PREDICTION, REFERENCE):
        found = inputs.prediction("network") if given == PREDICTION else inputs.reference("network")
        if found is None:
            got, advice = "an answer without a grid, or a target without a class", "Take another mask"
            if given == REFERENCE:
                got, advice = f"none for {payload['subject']}", "Add one to [reference]"
            raise check.refused(payload["id"], f"a {given} to hold the map against", got, advice)
        return found.to(image.x.device)
    path = payload["masks"][key]
    if path is None:
        got = f"none for {payload['subject']}"
        raise check.refused(payload["id"], f"a mask among {Path(given).name}", got, "Add one, or rename it")
    volume = labels.read(path)
    inside = labels.onto(volume, tuple(image.x.shape[1:]), image.prepared.affine) > 0
    return inside.to(image.x.device)


def judge(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Put a map to a metric, and say how its number stands beside those of random maps."""
    started = time.monotonic()
    section = Metric.model_validate(payload["metric"])
    spec = METRICS[section.metric]
    made = inputs.record(payload["of"])
    material = Material(inputs, payload["of"])
    with judging.as_reason(), execution(deadline=context.seconds, progress=context.progress) as run:
        masks = {key: mask_of(key, section, payload, material) for key in ("mask", "within")}
        given = {key: mask for key, mask in masks.items() if mask is not None}
        null = None
        if section.null is not None:
            null = judging.null_of(section.null), section.random_maps, section.better
        refs = (judging.baseline(section.baseline, material),) if removes(spec) else ()
        found = judging.answer(spec, section.parameters, material, refs=refs, masks=given, null=null)
        reasons = doubts(None if "explain" in spec.needs else material.map, **given)
    context.finishing(30.0)
    share = found.share
    if math.isnan(found.value) and share is not None:
        raise DeadlineExceeded(
            f"{payload['id']}: the deadline passed before there was a number. Allow more time"
        )
    if math.isnan(found.value) and not reasons:
        reasons = ["it is not defined for this map and score"]
    status = Status.DONE
    if share is not None:
        reasons.append(f"of {marks.portion(share)} of its samples: the deadline passed")
        status = Status.PARTIAL
    if found.nulls is not None and found.nulls.draws < section.random_maps:
        reasons.append(f"beside {found.nulls.draws} of {section.random_maps} random maps that have a number")
        status = Status.PARTIAL
    if made["status"] == Status.PARTIAL:
        reasons.append("the map is of a part of its samples")
        status = Status.PARTIAL
    folder = Path(payload["folder"])
    record = {
        **numbers(found),
        "curve": write_curve(folder, payload["id"], found),
        "status": status,
        "share_done": 1.0 if share is None else share,
        "reason": "; ".join(reasons) or None,
        "evaluations": material.evaluations[0],
        "events": list(run.events),
    }
    return ended(payload, record, context, started)


def numbers(found: Answer) -> Record:
    """Return the numbers of a record."""
    null = found.nulls
    return {
        "value": number(found.value),
        "standard_error": None if found.error is None else number(found.error),
        "null_mean": None if null is None else number(null.mean),
        "null_low": None if null is None else number(null.low),
        "null_high": None if null is None else number(null.high),
        "p": None if null is None else number(null.p),
        "null_draws": None if null is None else null.draws,
        "largest_tie": _of(found.curve, "largest_tie"),
    }


def _of(curve: Any, name: str) -> float | None:
    found = getattr(curve, name, None)
    return None if found is None else number(float(found))


def along(curve: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve as numbers along and up; one without fractions is counted in steps.

    >>> from esegeta.metrics import Cascade
    >>> along(Cascade(("a", "b"), torch.tensor([1.0, 0.5, 0.0]), torch.tensor(0.25)))[0].tolist()
    [0.0, 1.0, 2.0]
    """
    values = curve.values.double().cpu().numpy()
    fractions = getattr(curve, "fractions", None)
    return np.arange(len(values)) * 1.0 if fractions is None else fractions.double().cpu().numpy(), values


def write_curve(folder: Path, job: str, found: Answer) -> str | None:
    """Write a curve, and where those of random maps lie; return the name of the file."""
    if found.curve is None:
        return None
    x, y = along(found.curve)
    content: Record = {"fractions": x.tolist(), "values": y.tolist()}
    layers = getattr(found.curve, "layers", None)
    if layers is not None:
        content |= {"layers": list(layers), "fractions": None}
    if found.nulls is not None and found.nulls.curves:
        others = np.stack([np.interp(x, *along(curve)) for curve in found.nulls.curves])
        low, high = np.nanquantile(others, (0.025, 0.975), axis=0)
        content |= {
            "null_mean": np.nanmean(others, 0).tolist(),
            "null_low": low.tolist(),
            "null_high": high.tolist(),
        }
    name = Path(FOLDER, f"{job}_curve.json")
    outputs.write_json(folder / name, content)
    return name.as_posix()


def written_files(record: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to a record alone, relative to the folder of the run."""
    alone = [record.get("curve"), record.get("table"), *(record.get("figures") or {}).values()]
    return [name for name in alone if name]


# ------------------------------------------------------------------ over subjects


def _groups(planning: Planning, *keys: str) -> dict[tuple[str, ...], list[Job]]:
    found: dict[tuple[str, ...], list[Job]] = {}
    for job in planning.jobs:
        if job.kind == "metrics":
            found.setdefault(tuple(job.keys[key] for key in keys), []).append(job)
    return found


def mean_entries(planning: Planning) -> list[Job]:
    """Return a job for each target, method and metric over all subjects, if there are several."""
    if len(planning.images) < 2:
        return []
    return [
        Job(
            id=f"mean_{names.label(target)}_{names.label(method)}_{names.label(metric)}",
            kind="metrics_mean",
            keys={"target": target, "method": method, "metric": metric},
            given={"folder": planning.folder, "title": metric, "key": planning.config.run.key},
            decides=["metrics_mean", planning.config.run.key],
            after=tuple(jobs),
            need="any",
        )
        for (target, method, metric), jobs in _groups(planning, "target", "method", "metric").items()
    ]


def average(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Compute the mean of a metric over the subjects that have a number, with an interval by bootstrap."""
    started = time.monotonic()
    records = dict(inputs.many())
    known = {job: record["value"] for job, record in records.items() if record["value"] is not None}
    lost = {**inputs.missing(list(records)), **{j: "no number" for j in records if j not in known}}
    if not known:
        raise check.Refused(f"{payload['id']}: none of {len(lost)} subjects has a number")
    value, low, high = interval(torch.tensor(list(known.values()), dtype=torch.float64), payload["key"])
    events = []
    if lost:
        which = ", ".join(f"{job}: {status}" for job, status in sorted(lost.items()))
        message = f"The mean is of {len(known)} of {len(known) + len(lost)} subjects; without {which}."
        events.append({"event": "missing", "message": message})
    partly = any(records[job]["status"] == Status.PARTIAL for job in known)
    record = {
        "value": value,
        "low": number(low),
        "high": number(high),
        "better": next(iter(records.values()))["better"],
        "subjects": len(known),
        "subjects_asked": len(known) + len(lost),
        "missing": sorted(lost),
        "status": Status.PARTIAL if lost or partly else Status.DONE,
        "share_done": len(known) / (len(known) + len(lost)),
        "events": events,
    }
    return ended(payload, record, context, started)


# ------------------------------------------------------------------ curves


def curve_entries(planning: Planning) -> list[Job]:
    """Return a job for each target and metric that has curves: all methods in one figure."""
    found = []
    by_name = {table.own: table for table in tables_of(planning.config, TABLE, Metric)}
    for (target, metric), jobs in _groups(planning, "target", "metric").items():
        spec = METRICS.by_name[by_name[metric].metric]
        if spec.answer != "curve":
            continue
        title = by_name[metric].title or metric.replace("_", " ")
        found.append(
            Job(
                id=f"curves_{names.label(target)}_{names.label(metric)}",
                kind="metrics_curves",
                keys={"target": target, "metric": metric},
                given={
                    "folder": planning.folder,
                    "title": title,
                    "axes": spec.axes,
                    "figures": planning.config.output.figures,
                },
                decides=["metrics_curves", planning.config.output.figures, title, spec.axes],
                after=tuple(jobs),
                need="any",
            )
        )
    return found


def gather(payload: Record, inputs: Inputs, context: Context) -> Record:
    """Put the curves of all methods into one table and one figure, the mean over subjects for each."""
    started = time.monotonic()
    folder = Path(payload["folder"])
    rows: list[Record] = []
    lines: dict[str, list[Record]] = {}
    subjects: set[str] = set()
    for _, record in inputs.many():
        if not record.get("curve"):
            continue
        subjects.add(str(record["subject"]))
        curve = json.loads((folder / record["curve"]).read_text())
        area = math.nan if record.get("value") is None else record["value"]
        lines.setdefault(record["method"], []).append({**curve, "area": area})
        x = curve["fractions"] or range(len(curve["values"]))
        for n, (at, value) in enumerate(zip(x, curve["values"], strict=True)):
            beside = {key: curve[key][n] for key in NULL[:3] if key in curve}
            layer = {"layer": ["", *curve["layers"]][n]} if "layers" in curve else {}
            about = {key: record[key] for key in ("subject", "method")}
            rows.append({**about, "fraction": at, **layer, "value": value, **beside})
    if not rows:
        raise check.Refused(f"{payload['id']}: there is no curve")
    stem = f"{names.label(payload['keys']['target'])}_{names.label(payload['keys']['metric'])}"
    table = Path(FOLDER, f"{stem}_curves.csv")
    outputs.write_table(folder / table, rows)
    record = {
        "table": table.as_posix(),
        "figures": {},
        "events": [],
        "status": Status.DONE,
        "share_done": 1.0,
    }
    if payload["figures"]:
        path = Path(FOLDER, f"{stem}_curves.png")
        title = f"{payload['title']} ({payload['keys']['target']}), {of_whom(subjects)}"
        message = draw(lines, folder / path, title, payload["axes"])
        if message:
            record["events"] = [{"event": "figures", "message": message}]
        else:
            record["figures"] = {"curves": path.as_posix()}
    return ended(payload, record, context, started)


def mean_curve(curves: Sequence[Record], key: str = "values") -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of curves, on a grid that has the stops of all of them.

    >>> mean_curve([{"fractions": [0, 1], "values": [2, 0]}, {"fractions": [0, 0.5, 1], "values": [2, 2, 0]}])[1]
    array([2. , 1.5, 0. ])
    """
    steps = [curve["fractions"] or list(range(len(curve["values"]))) for curve in curves]
    x = np.unique(np.concatenate([np.asarray(step, dtype=float) for step in steps]))
    ys = [
        np.interp(x, step, np.asarray(curve[key], dtype=float))
        for step, curve in zip(steps, curves, strict=True)
    ]
    return x, np.mean(ys, 0)


def of_whom(subjects: Iterable[str]) -> str:
    """Return whose curves are in a figure.

    >>> of_whom(["sub-1"]), of_whom(["sub-1", "sub-2"])
    ('sub-1', 'mean of 2 subjects')
    """
    some = list(subjects)
    return some[0] if len(some) == 1 else f"mean of {len(some)} subjects"


def draw(lines: Mapping[str, Sequence[Record]], path: Path, title: str, axes: Sequence[str]) -> str | None:
    """Draw the mean curve of each method, with the curves of random maps behind it; say why if that cannot be.

    The legend has the mean of the areas. Axes are in the words of the metric.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return outputs.NO_FIGURES
    from esegeta import plot
    from esegeta.plot.canvas import numeral

    every = [curve for curves in lines.values() for curve in curves]
    x = np.unique(np.concatenate([mean_curve([curve])[0] for curve in every]))

    def onto(curves: Sequence[Record], key: str) -> np.ndarray:
        found: np.ndarray = np.interp(x, *mean_curve(curves, key))
        return found

    def labelled(method: str, curves: Sequence[Record]) -> str:
        area = float(np.mean([curve["area"] for curve in curves]))
        return f"{method} (area {numeral(area)})" if math.isfinite(area) else f"{method} (no area)"

    labels = {method: labelled(method, curves) for method, curves in lines.items()}
    bands = {
        labels[method]: (onto(curves, "null_low"), onto(curves, "null_high"))
        for method, curves in lines.items()
        if all("null_low" in curve for curve in curves)
    }
    figure = plot.curve(
        x,
        {labels[method]: onto(curves, "values") for method, curves in lines.items()},
        bands=bands,
        xlabel=axes[0],
        ylabel=axes[1],
        title=title,
        note="Shaded: where 95 % of the curves of random maps lie." if bands else "",
    )
    outputs.write_bytes(path, plot.png(figure))
    return None


# ------------------------------------------------------------------ kinds


def joined(record: Mapping[str, Any]) -> tuple[str, Record]:
    """Return the job whose row gets a column of its own, and that column."""
    return str(record["of"]), {str(record["metric"]): record.get("value")}


_BLANK: Mapping[str, Any] = dict.fromkeys(
    ("value", "standard_error", *NULL, "null_draws", "largest_tie", "curve", "reason", "evaluations")
)
_NOTE = (
    "Reason: why there is no number, or why it is of less than was asked for. Null: where 95 % of the numbers of "
    "random maps lie; p: the chance of a number as good for one of them. Forwards: images that the score was run on."
)
METRICS_KIND = register(
    Kind(
        name="metrics",
        table=TABLE,
        section=Metric,
        many=True,
        check=check_table,
        check_all=check_all,
        joins=joined,
        reads=("methods",),
        entries=entries,
        header=header,
        work=judge,
        cost=cost,
        group=METHODS.group,
        written=written_files,
        stem=lambda job: Path(FOLDER, job.id),
        blank=_BLANK,
        file="metrics",
        columns=(
            *("subject", "target", "method", "metric", "value", "standard_error", *NULL, "better"),
            *(
                "status",
                "reason",
                "evaluations",
                "seconds",
                "name",
                "null_draws",
                "largest_tie",
                "curve",
                "id",
            ),
        ),
        shown={
            "subject": "Subject",
            "target": "Target",
            "method": "Map",
            "title": "Metric",
            "value": "Value",
            "reason": "Reason",
            "standard_error": "Standard error",
            "better": "Better",
            "null_mean": "Null mean",
            "null_low": "Null from",
            "null_high": "to",
            "p": "p",
            "status": "Status",
            "evaluations": "Forwards",
            "seconds": "Seconds",
        },
        title="Metrics, one by one",
        note=_NOTE,
    )
)
MEAN = register(
    Kind(
        name="metrics_mean",
        table=TABLE,
        reads=("metrics",),
        entries=mean_entries,
        header=plan_header,
        work=average,
        blank=dict.fromkeys(("value", "low", "high", "better", "subjects", "subjects_asked", "missing")),
        file="metrics_mean",
        columns=(
            *("target", "method", "metric", "value", "low", "high", "better", "subjects", "subjects_asked"),
            *("missing", "status", "error"),
        ),
        shown={
            "target": "Target",
            "method": "Map",
            "metric": "Metric",
            "value": "Mean",
            "low": "From",
            "high": "to",
            "better": "Better",
            "subjects": "Subjects",
            "status": "Status",
        },
        title="Metrics, mean over subjects",
        note="From, to: an interval of 95 % by bootstrap over subjects.",
    )
)
CURVES = register(
    Kind(
        name="metrics_curves",
        table=TABLE,
        reads=("metrics",),
        entries=curve_entries,
        header=plan_header,
        work=gather,
        draws=True,
        written=written_files,
        stem=lambda job: Path(FOLDER, f"{names.label(job.target)}_{names.label(job.keys['metric'])}"),
        blank={"table": None, "figures": {}},
        file="metrics_curves",
        columns=("target", "metric", "table", "figures", "status", "error"),
        title="Curves",
        note="The mean over subjects for each method; the band is where 95 % of the curves of random maps lie.",
    )
)
