"""Imports point one way, and what is clever stays in the engine."""

import ast
import functools
import io
import tokenize
from pathlib import Path

from together import together

import esegeta

ROOT = Path(esegeta.__file__).parent

# From low to high: a line may import from itself and from lines above it, never from below.
ORDER = (
    "_types",
    "engine",
    "engine.refusals",
    "engine.levels",
    "engine.check",
    "engine.second_order",
    "engine.execution",
    "_facts",
    "engine.progress",
    "engine.memory",
    "engine.likeness",
    "engine.layout",
    "engine.windows",
    "engine.window_operators",
    "engine.locality",
    "engine.crops",
    "engine.operators",
    "engine.views",
    "engine.spellings",
    "engine.biases",
    "engine.twins",
    "engine.visits",
    "engine.interception",
    "engine.compiling",
    "engine.native",
    "engine.severed",
    "engine.folded",
    "engine.gradient",
    "engine.stream",
    "engine.ascent",
    "engine.estimates",
    "engine.sharing",
    "engine.local",
    "engine.tiles",
    "engine.stitching",
    "engine.batching",
    "engine.network",
    "engine.dropping",
    "engine.graph",
    "axioms",
    "_registry",
    "random",
    "spatial",
    "segmentation",
    "radiomics",
    "quadrature",
    "subdivision",
    "patches",
    "models",
    "noise",
    "harmonic",
    "baselines",
    "reducers",
    "trees",
    "placing",
    "features",
    "coalitions",
    "shapley_kernel",
    "masks",
    "rules",
    "dreams",
    "uncertainty",
    "methods",
    "transforms",
    "metrics",
    "dissection",
    "lesions",
    "concepts",
    "zoo",
    "conformance",
    "plot",
    "__init__",
    "run",
    "run.bounds",
    "run.volumes",
    "run.volumes.reading",
    "run.volumes.nifti",
    "run.volumes.pictures",
    "run.volumes.files",
    "run.volumes.names",
    "run.volumes.labels",
    "run.volumes.padding",
    "run.volumes.grids",
    "run.volumes.prepared",
    "run.volumes.intensities",
    "run.volumes.steps",
    "run.volumes.preprocess",
    "run.config",
    "run.config.faults",
    "run.config.tables",
    "run.config.catalogue",
    "run.config.trust",
    "run.config.schema",
    "run.jobs",
    "run.jobs.kinds",
    "run.config.listing",
    "run.config.plugins",
    "run.config.sources",
    "run.config.building",
    "run.config.loading",
    "run.config.toml",
    "run.config.starter",
    "run.config.original",
    "run.config.convert",
    "run.executors",
    "run.executors.status",
    "run.executors.protocol",
    "run.executors.journal",
    "run.executors.stopping",
    "run.executors.keeper",
    "run.executors.processes",
    "run.executors.local",
    "run.executors.child",
    "run.jobs.marks",
    "run.jobs.outputs",
    "run.jobs.parts",
    "run.jobs.plan",
    "run.jobs.inputs",
    "run.jobs.methods",
    "run.jobs.summary",
    "run.jobs.judging",
    "run.jobs.metrics",
    "run.jobs.dreams",
    "run.jobs.uncertainty",
    "run.jobs.dissection",
    "run.jobs.table",
    "run.jobs.figures",
    "run.jobs.dispatch",
    "run.report",
    "run.report.display",
    "run.report.page",
    "run.comparison",
    "run.log",
    "run.pipeline",
    "app",
    "app.security",
    "app.state",
    "app.private",
    "app.forms",
    "app.pictures",
    "app.trial",
    "app.runs",
    "app.keeping",
    "app.server",
    "app.launch",
    "cli",
    "__main__",
    "_tables",
    "_stubs",
)
# A package that stands for all of its files: they are many, and found by name. Inside there is no circle either.
WHOLE = (
    "radiomics",
    "rules",
    "dreams",
    "uncertainty",
    "methods",
    "transforms",
    "metrics",
    "axioms",
    "zoo",
    "conformance",
    "plot",
)
SURFACE = "__init__"  # whoever takes a name from it may bring in any module of the stub

FUNCTORCH = ("torch._C", "torch._functorch", "torch._subclasses")
# A method says what is computed. How (devices, chunks, global random numbers, graphs) is the engine's.
ENGINES_BUSINESS = (
    "cuda",
    "requires_grad_",
    "manual_seed",
    "randn",
    "rand",
    "rand_like",
    "randn_like",
    "randperm",
)
LONGEST_METHOD = 80


def files():
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or SURFACE


def place_of(name):
    """The line of ``ORDER`` that a module belongs to."""
    head = name.partition(".")[0]
    if name not in ORDER and head in WHOLE:
        name = head
    return ORDER.index(name) if name in ORDER else None


def never_run(tree):
    """The nodes that only type checkers read."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }


@functools.cache  # several tests read every file
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def imports_of(path):
    """Dotted names of everything that a file imports, wherever in the file, doctests excepted."""
    found = set()
    tree = tree_of(path)
    silent = never_run(tree)
    for node in ast.walk(tree):
        if node in silent:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full, so that its direction shows"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(dotted):
    """The module of this package that an imported name lies in, None for other packages."""
    if dotted.partition(".")[0] != "esegeta":
        return None
    parts = dotted.split(".")[1:]
    while parts and not (ROOT.joinpath(*parts).is_dir() or ROOT.joinpath(*parts).with_suffix(".py").exists()):
        parts.pop()
    return ".".join(parts) or SURFACE


def code_lines(path):
    """Lines that hold code: no comments, no docstrings, no blank lines, nothing that a decorator declares."""
    text = path.read_text()
    docs = set()
    for node in ast.walk(ast.parse(text)):
        for declared in getattr(node, "decorator_list", ()):
            docs |= set(range(declared.lineno, declared.end_lineno + 1))
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


def test_every_module_has_a_place():
    homeless = [name_of(p) for p in files() if place_of(name_of(p)) is None]
    assert not homeless, f"{homeless}: enter these modules in ORDER, above everything that imports them"


def test_every_place_has_a_module():
    assert set(ORDER) <= {name_of(p) for p in files()}


@together("path", files(), ids=name_of)
def test_imports_point_one_way(path):
    here = place_of(name_of(path))
    for dotted in sorted(imports_of(path)):
        module = module_of(dotted)
        if module is not None:
            there = place_of(module)
            assert there is not None, f"{module} is not in ORDER"
            assert there <= here, f"{name_of(path)} imports {dotted}, which stands above it"


def circles(imports):
    """The groups of modules that need one another: what is left when all that need nothing of the rest are gone."""
    left = dict(imports)
    while True:
        free = {name for name, needs in left.items() if not needs & set(left) - {name}}
        free |= {name for name in left if not any(name in left[other] for other in left if other != name)}
        if not free:
            return sorted(left)
        left = {name: needs for name, needs in left.items() if name not in free}


def test_nothing_imports_in_a_circle():
    """Imports inside functions count: they only hide a circle."""
    needs = {name_of(path): {module_of(dotted) for dotted in imports_of(path)} for path in files()}
    assert circles(needs) == []


def test_circles_are_found(tmp_path):
    assert circles({"a": {"b"}, "b": {"c", None}, "c": {"a"}, "d": {"a"}, "e": set(), "f": {"f"}}) == list(
        "abc"
    )
    path = tmp_path / "f.py"
    path.write_text("if TYPE_CHECKING:\n    import a\n\ndef f():\n    import b\n")
    assert imports_of(path) == {"b"}


@together("path", files(), ids=name_of)
def test_the_insides_of_functorch_and_context_variables_stay_in_the_engine(path):
    if name_of(path).partition(".")[0] == "engine":
        return
    for dotted in imports_of(path):
        assert not any(f"{dotted}.".startswith(f"{private}.") for private in FUNCTORCH), dotted
        assert dotted.partition(".")[0] != "contextvars", dotted
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in FUNCTORCH, (
                f"{name_of(path)}, line {node.lineno}: {ast.unparse(node)}"
            )


MATHEMATICS = [p for p in files() if name_of(p).partition(".")[0] in ("methods", "transforms")]


@together("path", MATHEMATICS, ids=name_of)
def test_methods_and_transforms_leave_devices_chunks_and_randomness_to_others(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            # esegeta.random has no such names; torch's draw from a global state.
            assert node.attr not in ENGINES_BUSINESS, f"{path.name}, line {node.lineno}: {whole}"
        if isinstance(node, ast.Name):
            assert node.id not in ("chunk", "chunks", "chunk_size"), (
                f"{path.name}, line {node.lineno}: {node.id}"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            moved = [a for a in node.args if isinstance(a, ast.Attribute) and a.attr == "device"]
            named = [k for k in node.keywords if k.arg == "device"]
            text = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            assert not [*moved, *named, *text], f"{path.name}, line {node.lineno}: moves between devices"


@together("path", MATHEMATICS, ids=name_of)
def test_a_method_is_short(path):
    lines = code_lines(path)
    assert lines <= LONGEST_METHOD, (
        f"{path.name} has {lines} lines of code: a reducer, rule or transform hides in it"
    )


def test_code_lines_are_counted_right(tmp_path):
    path = tmp_path / "f.py"
    path.write_text(
        '"""Doc.\n\nMore.\n"""\n\n# why\nx = """a\nb"""\n\n'
        'def f():\n    """Doc."""\n    return (\n        1  # one\n    )\n'
    )
    assert code_lines(path) == 2 + 1 + 3


def test_an_import_is_traced_to_its_module():
    assert module_of("esegeta.engine.check") == "engine.check"
    assert module_of("esegeta.engine.check.problem") == "engine.check"
    assert module_of("esegeta.from_module") == module_of("esegeta") == SURFACE
    assert module_of("torch.func.grad") is None
