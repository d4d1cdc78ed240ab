"""From the grid of a file to the grid and the intensities that a network was trained on, and back for its maps.

A step is made from parameters, which are checked at once, and is a function ``Prepared -> Prepared``. It notes what
it did, so that ``Prepared.back`` puts a map onto the grid of the file.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

import esegeta.run.volumes.intensities
import esegeta.run.volumes.steps  # noqa: F401  what these two register are the steps
from esegeta._registry import STEPS
from esegeta.engine import check
from esegeta.run.volumes.prepared import Prepared, Step
from esegeta.run.volumes.reading import Volume

__all__ = ["Prepared", "Step", "apply", "problems", "step"]


def apply(volume: Volume, steps: Iterable[Step | Mapping[str, Any]]) -> Prepared:
    """Take a volume through steps, one after another.

    Args:
        volume: from ``volumes.read``.
        steps: made by the functions that are registered as steps, or tables ``{"step": name, parameter: value}``.

    Example:
        >>> import torch
        >>> from esegeta.run.volumes.steps import crop
        >>> box = Volume(torch.arange(6.)[None], np.diag([2., 2., 2., 1.]), (2.0,))
        >>> done = apply(box, [crop([[1, 5]]), {"step": "normalise", "how": "minmax"}])
        >>> done.data.tolist(), done.affine[0].tolist()
        ([[0.0, 0.3333333432674408, 0.6666666865348816, 1.0]], [2.0, 0.0, 0.0, 2.0])
        >>> done.back(torch.ones(1, 4)).tolist()
        [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
    """
    now = Prepared(volume.data, np.array(volume.affine, dtype=np.float64), tuple(volume.spacing))
    if not isinstance(steps, Iterable) or isinstance(steps, (str, bytes, Mapping, torch.Tensor)):
        got, advice = check.describe(steps), 'Pass for example [{"step": "pad", "multiple": 8}]'
        raise check.refused_type("preprocess", "a list of steps", got, advice)
    for one in steps:
        if not isinstance(one, Mapping) and not callable(one):
            raise _no_step(one)
        now = (step(one) if isinstance(one, Mapping) else one)(now)
    return now


def step(table: Mapping[str, Any]) -> Step:
    """Return the step that a table of a configuration asks for, its parameters checked."""
    parameters = dict(table)
    name = parameters.pop("step", None)
    if not isinstance(name, str) or name not in STEPS:
        got = "none" if name is None else repr(name)
        advice = 'Write step = "name"' if name is None else check.nearest(name, STEPS)
        raise check.refused("preprocess", f"a step of {', '.join(STEPS)}", got, advice)
    make = STEPS[name].fn
    known = inspect.signature(make).parameters
    for given in parameters:
        if given not in known:
            advice = check.nearest(given, known)
            raise check.refused(name, f"parameters of {', '.join(known)}", repr(given), advice)
    for wanted, parameter in known.items():
        if parameter.default is parameter.empty and wanted not in parameters:
            raise check.refused(name, f"the parameter {wanted}", "none", f"Add {wanted} to the step")
    return make(**parameters)


def problems(tables: Iterable[Any]) -> list[str]:
    """Return all that is wrong with the parameters of steps, a line each, found without an image.

    >>> tables = [{"step": "pad", "multiple": 0}, {"step": "reorient", "to": "RAS"}, {"step": "crp"}]
    >>> for line in problems(tables):  # doctest: +ELLIPSIS
    ...     print(line)
    [0]: pad: expected multiple of whole numbers > 0, got int 0. Pass for example 8.
    [2]: preprocess: expected a step of clip, ..., got 'crp'. Nearest: crop, clip.
    """
    found = []
    for i, table in enumerate(tables):
        try:
            if not isinstance(table, Mapping):
                raise _no_step(table)
            step(table)
        except (TypeError, ValueError) as error:
            found.append(f"[{i}]: {error}")
    return found


def _no_step(value: object) -> check.RefusedType:
    return check.refused_type("preprocess", "a table with step = name", check.describe(value), "Write one")
