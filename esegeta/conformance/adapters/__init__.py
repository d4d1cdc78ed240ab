"""Methods of other libraries as subjects: ``find("captum:DeepLift")``."""

import ast
from typing import Any

from esegeta.conformance.adapters import captum, grad_cam, monai, peers, shap, zennit
from esegeta.conformance.adapters.peers import Peer
from esegeta.conformance.subjects import Subject
from esegeta.engine import check

LIBRARIES: dict[str, dict[str, Peer]] = {
    "captum": captum.METHODS,
    "zennit": zennit.METHODS,
    "shap": shap.METHODS,
    "monai": monai.METHODS,
    "grad_cam": grad_cam.METHODS,
}


def names() -> list[str]:
    """Return the methods of other libraries that can be verified, whether or not their packages are installed.

    Returns:
        Names for ``find`` and for ``verify``.

    Example:
        >>> [name for name in names() if name.endswith("IntegratedGradients")]
        ['captum:IntegratedGradients', 'captum:LayerIntegratedGradients', 'zennit:IntegratedGradients']
    """
    return [f"{library}:{name}" for library, methods in LIBRARIES.items() for name in methods]


def find(text: str) -> Subject:
    """Return a method of another library, with its own defaults or with options, which are literals.

    Classes that explain a layer take the convolution with the smallest output; ``layer="encoder.0"`` names another
    module, ``layer="input"`` a copy of the input.

    Args:
        text: ``"captum:DeepLift"``, or ``"captum:IntegratedGradients(method='riemann_trapezoid', n_steps=10)"``.

    Returns:
        A subject. The explanation that it builds runs the library on a batch of one. It also has
        ``explain.facts.batched(xs, *refs, key=)``, which gives a batch to the library: a baseline for every example,
        but the same baselines for all.

    Example:
        >>> find("captum:IntegratedGradients(n_steps=3)").nodes
        3
    """
    library, name, options = parsed(text)
    if library not in LIBRARIES or name not in LIBRARIES[library]:
        expected = f"a method of {', '.join(LIBRARIES)}"
        raise check.refused("verify", expected, repr(text), check.nearest(f"{library}:{name}", names()))
    return peers.subject(text.strip(), LIBRARIES[library][name], options)


def parsed(text: str) -> tuple[str, str, dict[str, Any]]:
    """Return the library, the name and the options of a call in words."""
    library, _, call = text.strip().partition(":")
    try:
        tree = ast.parse(call.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return library, tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            options = {k.arg: ast.literal_eval(k.value) for k in tree.keywords if k.arg}
            if len(options) == len(tree.keywords):
                return library, tree.func.id, options
    except (SyntaxError, ValueError):
        pass
    raise check.refused(
        "verify",
        "library:Method, or library:Method(option=value) with values that are literals",
        repr(text),
        "Write for example captum:IntegratedGradients(n_steps=10)",
    )
