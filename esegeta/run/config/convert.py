"""Configurations of the original system, TorchEsegeta, in the words of this one.

Its four JSON layouts have a header, a list ``methods`` and a list ``explain_methods``; every entry has keywords that
went to one of four libraries. What they meant is translated; what they did otherwise than they said is told.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esegeta._registry import METHODS
from esegeta.engine import check
from esegeta.engine.refusals import one_line
from esegeta.run import bounds
from esegeta.run.config.faults import Faults, nearest, shown
from esegeta.run.config.original import DREAMS, RULES, SMOOTHED, New, Old, Rule, Table
from esegeta.run.config.toml import written

WHERE = "convert"

# Spellings of the original, and what people make of them.
SPELLINGS = {
    "amp_enabled": "amp_enbled",
    "center_crop": "centre_crop",
    "uncertainty_metrics": "uncertainity_metrics",
    "uncertainty_cascading": "uncertainity_cascading",
    "uncertainty": "uncertainity_metrics",
    "uncertainity": "uncertainity_metrics",
    "input_transform_req": "inpt_transform_req",
    "visualise_method": "visualize_method",
    "sliding_window_shape": "sliding_window_shapes",
    "stdev": "stdiv",
}
METHOD_SPELLINGS = {
    "captum_layer_activation": "captum_layer_activaltion",
    "captum_saliency": "captum_Saliency",
    "lime": "lime_segmentation",
}
HEADER = (
    *(
        "model_nature",
        "model_name",
        "is_3d",
        "isDepthFirst",
        "batch_dim_present",
        "default",
        "dataset",
        "test_run",
    ),
    *(
        "resize",
        "centre_crop",
        "mean_vec",
        "std_vec",
        "patch_overlap",
        "patch_size",
        "log_level",
        "output_path",
    ),
    *("amp_enbled", "share_gpu_threads", "timeout_enabled", "timeout_time", "methods", "explain_methods"),
)
ENTRY = (
    *("method_name", "library", "inpt_transform_req", "visualize_method", "sign", "show_colorbar", "title"),
    *(
        "device_id",
        "share_gpu",
        "patch_required",
        "use",
        "uncertainity_metrics",
        "uncertainity_cascading",
        "keywords",
    ),
)


class Conversion(NamedTuple):
    """text: the configuration in TOML; config: the same as tables; notes: a line for every entry and change."""

    text: str
    config: Table
    notes: list[str]


def read(path: Path) -> Table:
    """Read a JSON file of the original. Its ``_comment`` stands several times in one table."""
    try:
        raw = json.loads(bounds.text(path))
    except OSError as error:
        got = (error.strerror or "an error").lower()
        raise _refused(f"{path} to be a file that can be read", got, "Check its name") from None
    except bounds.TooMuch as error:
        raise _refused(f"{path} to be {error.expected}", error.got, error.advice) from None
    except UnicodeDecodeError:
        raise _refused(f"{path} to be text", "other bytes", "Name a JSON file of TorchEsegeta") from None
    except ValueError as error:
        raise _refused(f"{path} to be JSON", f"a fault in it: {error}", "Correct it there") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("methods"), list):
        advice = "It has model_nature, model_name, ... and a list methods"
        raise _refused(f"{path} to be a configuration of TorchEsegeta", "something else", advice)
    return raw


def _refused(expected: str, got: str, advice: str) -> Faults:
    return Faults([str(check.refused(WHERE, expected, got, advice))])


def convert(old: Mapping[str, Any], source: str = "my_network:build", files: str | None = None) -> Conversion:
    """Translate a configuration of the original.

    Args:
        old: the whole file, as JSON has it.
        source: ``model.source``: the original took the network as an object, so its file does not say where it is.
        files: ``input.files``, for the same reason.

    Returns:
        The new configuration, and a line for every entry and every header key that means something else here.

    Example:
        >>> entry = {"method_name": "captum_Saliency", "use": True, "keywords": {"abs": False}}
        >>> done = convert({"model_nature": "Classification", "methods": [entry]})
        >>> done.config["methods"], done.notes[0]
        ([{'name': 'gradient', 'id': 'captum_Saliency'}], 'captum_Saliency: gradient.')
    """
    notes: list[str] = []
    header = _spelled(old, HEADER, "the header", notes)
    volumes = bool(header.get("is_3d", False))
    entries = [e for key in ("methods", "explain_methods") for e in header.get(key) or []]
    tables = [
        _spelled(e, ENTRY, f"entry {n}", notes) for n, e in enumerate(entries) if isinstance(e, Mapping)
    ]
    if not any(t.get("use") for t in tables):
        notes.append("use: no entry had use = true; all of them are active here.")
        tables = [{**t, "use": True} for t in tables]
    size = _number(header.get("patch_size"), -1)
    methods: list[Table] = []
    dreams: list[Table] = []
    lines: list[str] = []
    of_entry: dict[str, list[Table]] = {}
    for table in tables:
        dreamed = table.get("method_name") in DREAMS
        made, line = _dream(table, volumes) if dreamed else _entry(table, volumes, size > 0)
        if line:
            lines.append(line if table["use"] else f"{line[:-1]}; left out: it had use = false.")
        if not table["use"]:
            continue
        if dreamed:
            dreams += made
        else:
            methods += made
            of_entry.setdefault(str(table.get("method_name", "")), []).extend(made)
    _with_ids(methods)
    _with_ids(dreams)
    ids = {name: [method["id"] for method in made] for name, made in of_entry.items()}
    config = {
        "model": {"source": source},
        "input": {
            "files": files or ("scans/*.nii.gz" if volumes else "images/*.png"),
            **_prepared(header, tables, volumes, notes),
        },
        "targets": _targets(header, notes),
        "methods": methods,
        **({"dreams": dreams} if dreams else {}),
        **_metrics([table for table in tables if table["use"]], ids, notes),
        **_patches(header, size, methods, notes),
        "run": _run(header, tables, notes),
    }
    notes += _other_notes(header, tables)
    if dreams and not methods:
        notes.append("methods: a run explains its images by at least one: add a table [[methods]].")
    head = "Translated from a configuration of TorchEsegeta. Fill in model, input and targets."
    return Conversion(written(config, head), config, [one_line(line) for line in (*lines, *notes)])


def _spelled(table: Mapping[str, Any], known: tuple[str, ...], where: str, notes: list[str]) -> Table:
    """The table with the original's own spellings; keys that it never had are told."""
    found: Table = {}
    for key, value in table.items():
        name = SPELLINGS.get(key, key)
        if name in known:
            found[name] = value
        elif key != "_comment":
            notes.append(f"{key}: of {where}, not a key of the original. {nearest(key, known)}.")
    return found


def _sound(value: Any) -> bool:
    """Whether a value can stand in a configuration, whatever stood in the original's."""
    if isinstance(value, (list, tuple)):
        return all(map(_sound, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _sound(v) for k, v in value.items())
    return isinstance(value, (bool, str)) or (isinstance(value, (int, float)) and abs(value) < float("inf"))


def _number(value: Any, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def _entry(table: Table, volumes: bool, patches: bool) -> tuple[list[Table], str]:
    """The methods that an entry becomes, and the line about it."""
    name = str(table.get("method_name", ""))
    name = METHOD_SPELLINGS.get(name, name)
    table.setdefault("use", False)
    if name not in RULES:
        known = nearest(name, (*RULES, *DREAMS))
        return [], f"{shown(name)}: not translated: not a method of the original. {known}."
    old = _old(table, name, volumes)
    made_of = _translated(RULES[name], old)
    if made_of is None:
        return [], _odd(name, table)
    fields, said = made_of
    fields = {"name": fields["name"], "id": name, **{k: v for k, v in fields.items() if k != "name"}}
    if table.get("title"):
        fields["title"] = str(table["title"])
    notes = list(said)
    if patches and table.get("patch_required"):
        if on_layer(fields):
            notes.append(
                "patch_required is left out: its map is that of a layer, of which each patch has another"
            )
        else:
            fields["patches"] = "per_patch"
    if fields.get("place") in ("", ":in"):
        return [], f"{name}: not translated: its keywords name no layer."
    made, kind = [fields], str(old.keywords.get("nt_type"))
    if kind in SMOOTHED and volumes:
        notes.append(
            f'nt_type had no effect on volumes; transforms = [{{name = "{SMOOTHED[kind]}", ...}}] has'
        )
    elif kind in SMOOTHED:
        noise = {"name": "absolute", "sigma": 1.0}  # Captum's default
        change = {
            "name": SMOOTHED[kind],
            "noise": noise,
            "samples": _number(old.keywords.get("n_samples"), 5),
        }
        title = {"title": f"{fields['title']}, {kind}"} if "title" in fields else {}
        made.append({**fields, **title, "id": f"{name}-{kind}", "transforms": [change]})
        notes.append(f"and once more with {SMOOTHED[kind]}")
    return made, f"{name}: {'; '.join([fields['name'], *notes])}."


def _dream(table: Table, volumes: bool) -> tuple[list[Table], str]:
    """Return the dream that an entry becomes, and the line about it."""
    name = str(table["method_name"])
    table.setdefault("use", False)
    made_of = _translated(DREAMS[name], _old(table, name, volumes))
    if made_of is None:
        return [], _odd(name, table)
    fields, notes = made_of
    if fields["objective"]["place"] in ("", ":in"):
        return [], f"{name}: not translated: its keywords name no layer."
    title = {"title": str(table["title"])} if table.get("title") else {}
    line = f"{name}: [[dreams]], recipe {fields['recipe']}; {'; '.join(notes)}."
    return [{"id": name, **title, **fields}], line


def _old(table: Table, name: str, volumes: bool) -> Old:
    words = table.get("keywords")
    known = _spelled(words, (*words, *SPELLINGS.values()), name, []) if isinstance(words, dict) else {}
    return Old(known, volumes)


def _translated(rule: Rule, old: Old) -> New | None:
    """Return what a rule makes of an entry, None if its keywords are none of the original's."""
    try:
        made = rule(old)
    except (ValueError, TypeError):
        return None
    return made if _sound(made.fields) else None


def _odd(name: str, table: Table) -> str:
    words = shown(table.get("keywords"))
    return f"{name}: not translated: its keywords are not those of the original: {words}."


def on_layer(fields: Table) -> bool:
    """Check whether the map of an entry lies on the grid of a layer.

    >>> on_layer({"name": "grad_cam", "place": "a"}), on_layer({"name": "guided_grad_cam", "place": "a"})
    (True, False)
    """
    spec = METHODS[fields["name"]]
    return "place" in fields and not (spec.place and spec.shape == "input")


def _metrics(tables: list[Table], made: Mapping[str, list[str]], notes: list[str]) -> Table:
    """Return the metrics of those methods whose entries asked for them."""
    asked = [t for t in tables if t.get("uncertainity_metrics") or t.get("uncertainity_cascading") == 2]
    ids = [name for table in asked for name in made.get(str(table.get("method_name", "")), [])]
    if any(table.get("uncertainity_cascading") for table in tables):
        notes.append(
            "uncertainity_cascading: no metric of a run randomises the network step by step; "
            "esegeta.metrics.randomisation does in Python."
        )
    if not ids:
        return {}
    notes.append(
        "uncertainity_metrics: infidelity and sensitivity_max. The original drew one perturbation for the one and "
        "two for the other, and took the median over patches: here there are more, and they are of the whole image."
    )
    methods = {} if len(ids) == sum(map(len, made.values())) else {"methods": list(dict.fromkeys(ids))}
    return {"metrics": [{"metric": metric, **methods} for metric in ("infidelity", "sensitivity_max")]}


def _with_ids(methods: list[Table]) -> None:
    seen: dict[str, int] = {}
    for method in methods:
        seen[method["id"]] = seen.get(method["id"], 0) + 1
        if seen[method["id"]] > 1:
            method["id"] += f"-{seen[method['id']]}"


def _prepared(header: Table, tables: list[Table], volumes: bool, notes: list[str]) -> Table:
    """Pictures were resized, cut and normalised for entries that asked for it; volumes never were."""
    if volumes or not any(table.get("inpt_transform_req") for table in tables):
        return {}
    steps: list[Table] = []
    if _sound(header.get("resize")):
        steps.append({"step": "resize", "shape": header["resize"]})
        notes.append(
            "resize: it was the length of the shorter side; here pictures that are not square are squeezed into one."
        )
    if _sound(header.get("centre_crop")):
        steps.append({"step": "fit", "shape": header["centre_crop"]})
    steps.append({"step": "normalise", "how": "fixed", "std": 255})  # as torchvision's ToTensor
    if _sound([header.get("mean_vec"), header.get("std_vec")]):
        steps.append(
            {"step": "normalise", "how": "fixed", "mean": header["mean_vec"], "std": header["std_vec"]}
        )
    return {"preprocess": steps}


def _targets(header: Table, notes: list[str]) -> list[Table]:
    if str(header.get("model_nature", "")).lower().startswith("seg"):
        notes.append(
            "targets: the original took them in code. predicted_class_sum is its multi_class wrapper, otsu_sum its "
            "threshold_based one, whose gradient was zero: it summed z / z. Maps are others than they were."
        )
        return [{"name": "class_1", "reducer": "predicted_class_sum", "class": 1}]
    notes.append("targets: the original took them in code. Class 0 stands for yours.")
    return [{"name": "class_0", "reducer": "logit", "class": 0}]


def _patches(header: Table, size: int, methods: list[Table], notes: list[str]) -> Table:
    if size <= 0 or not any("patches" in method for method in methods):
        return {}
    overlap = max(_number(header.get("patch_overlap"), 0), 0)
    notes.append(
        'patches: "per_patch" is what the original did: each patch has a score of its own, and the map explains none '
        'of the whole. "stitched" explains the score of the whole volume.'
    )
    return {
        "patches": {
            "size": size,
            "overlap": round(overlap / size, 6) if overlap < size else 0.0,
            "weights": "average",
        }
    }


def _run(header: Table, tables: list[Table], notes: list[str]) -> Table:
    names = [str(header[key]) for key in ("model_name", "dataset", "test_run") if header.get(key)]
    folder = re.sub(r"[^\w.-]+", "_", "_".join(names)) or "results"
    run: Table = {"output": folder}
    if header.get("output_path"):
        notes.append(
            f"output_path: {shown(header['output_path'])} is left out: run.output is {folder}, beside the file."
        )
    shared = [table.get("share_gpu", False) for table in tables]
    if shared and all(shared):
        run["per_device"] = max(_number(header.get("share_gpu_threads"), 1), 1)
    if header.get("timeout_enabled"):
        run["deadline"] = _number(header.get("timeout_time"), 3600)
        notes.append("timeout_time: it was for the whole; run.deadline is for each method by itself.")
    devices = sorted({str(table["device_id"]) for table in tables if table.get("device_id")})
    if devices:
        text = ", ".join(f'"{device}"' for device in devices)
        notes.append(f"device_id: run.devices is left at cpu; for what it was: devices = [{text}].")
    if header.get("amp_enbled"):
        notes.append(
            'amp_enbled: maps are computed in float32; run.precision = "float16" is what it did to patches.'
        )
    return run


def _other_notes(header: Table, tables: list[Table]) -> list[str]:
    notes = []
    if any(table.get("sign") or table.get("visualize_method") for table in tables):
        signs: dict[str, list[str]] = {}
        for table in tables:
            if table.get("sign"):
                signs.setdefault(str(table["sign"]), []).append(str(table.get("method_name")))
        of_all = len(signs) == 1
        told = "; ".join(f"{shown(s)} of {'all' if of_all else ', '.join(n)}" for s, n in signs.items())
        said = (
            f' Asked for: {told}. transforms = [{{name = "positive"}}] changes the map itself.'
            if told
            else ""
        )
        notes.append(
            "sign, visualize_method, show_colorbar: maps keep their sign; figures show |a|, a+ and a-, always."
            + said
        )
    for key in ("isDepthFirst", "batch_dim_present", "default", "log_level"):
        if key in header:
            notes.append(f"{key}: has no meaning here.")
    return notes
