"""Every Python block of the pages runs, and the pages say what is there."""

import ast
import re
from pathlib import Path

import pytest
from together import together

import esegeta
from esegeta import _stubs, _tables

ROOT = Path(esegeta.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(#[^)]*)?\)")


# What the script on the first screen comes to; there it would only be in the way.
README_HOLDS = """
assert a.shape == smoothed.shape == x.shape and many.shape == xs.shape
assert torch.allclose(many[0], a, atol=1e-3 * a.abs().max().item())
assert layer.shape == (8, *x.shape[1:]) and [m.shape for m in maps] == [(1, 16, 16, 16)] * 2
assert layer.isfinite().all() and torch.allclose(head(trunk(x)), score(x))
assert torch.allclose(rest, a.sum() - (score(x) - score(baseline)), rtol=1e-3)
"""


def title(path):
    return path.relative_to(ROOT).as_posix()


def code(path):
    """The blocks of a page as one file, each at its own line, so that a traceback points into the page."""
    text = path.read_text()
    lines = [""] * text.count("\n")
    for found in BLOCK.finditer(text):
        start = text.count("\n", 0, found.start(1))
        block = found[1].splitlines()
        lines[start : start + len(block)] = block
    return "\n".join(lines) + "\n"


LONG = (
    *("docs/pipeline.md", "docs/verification.md", "docs/strategies.md", "docs/cams.md", "docs/patches.md"),
    *("docs/coalitions.md", "docs/write_a_kind.md", "README.md", "docs/dreams.md", "docs/figures.md"),
    *("docs/local_evaluation.md", "docs/concepts.md"),
)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=title(p), marks=pytest.mark.slow if title(p) in LONG else ()) for p in PAGES],
)
def test_the_code_of_a_page_runs(path):
    source = code(path)
    if path.name == "README.md":  # the real network: as it stands, but with fewer gradients
        assert "steps=8" in source
        assert "samples=4" in source
        source = source.replace("steps=8", "steps=2").replace("samples=4", "samples=2") + README_HOLDS
    if source.strip():
        assert "assert" in source, "nothing on this page can fail"
        exec(compile(source, str(path), "exec"), {"__name__": "page"})


@together("path", PAGES, ids=title)
def test_the_tables_of_a_page_are_current(path):
    text = path.read_text()
    assert text == _tables.fill(text), f"Run: {_tables.COMMAND}"
    assert ("<!-- table:" in text) == (title(path) in _tables.PAGES)


@together("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=title)
def test_the_links_of_a_page_lead_somewhere(path):
    for target, anchor in LINK.findall(path.read_text()):
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            assert anchor[1:] in [
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in heads
            ], anchor


def test_every_page_is_linked_from_the_first():
    linked = {f"docs/{target}" for target, _ in LINK.findall((ROOT / "docs" / "index.md").read_text())}
    assert {title(p) for p in PAGES[1:]} - {"docs/index.md"} <= linked


def test_the_stub_is_current():
    stub = _stubs.PATH.read_text() if _stubs.PATH.exists() else ""
    assert stub == _stubs.text(), f"Run: {_stubs.COMMAND}"
    assert _stubs.OF_AXIOMS.read_text() == _stubs.text_of_axioms(), f"Run: {_stubs.COMMAND}"


def test_the_stub_names_what_the_package_has():
    public = set(re.findall(r'^    "(\w+)",$', _stubs.text(), re.MULTILINE))
    assert public == set(esegeta.__all__)
    assert all(hasattr(esegeta, name) for name in public)


def test_commands_of_the_readme_are_the_ones_that_are_run():
    readme = (ROOT / "README.md").read_text()
    tests = [line for line in readme.splitlines() if line.startswith("python3 -m venv") and "pytest" in line]
    assert len(tests) == 1
    assert tests[0] in (ROOT / ".ci" / "run").read_text()


def test_a_page_reports_the_line_that_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\n```\n\nMore.\n\n```python\nassert x == 2\n```\n")
    assert code(page).splitlines()[3] == "x = 1"
    with pytest.raises(AssertionError) as caught:
        exec(compile(code(page), str(page), "exec"), {})
    assert caught.traceback[-1].lineno + 1 == 10


# No verb begins with one of these; other words that end like a plural, a participle or a gerund are none either.
NO_VERBS = re.compile(
    "A|About|After|All|Also|An|And|Another|As|At|Both|By|Each|Every|For|From|He|How|If|In|Inside|It|Its|Like|No|Nor|Of|"
    "On|One|Only|Or|Other|Over|Some|That|The|Their|There|These|They|This|Those|To|Under|What|When|Where|Whether|"
    "Which|Who|Why|With|Without"
)
VERBS_IN_S = {"Compress", "Cross", "Express", "Pass", "Process"}
VERBS_IN_ED = {"Embed", "Feed", "Need", "Read", "Seed", "Spread", "Bring"}


def is_verb(word):
    """Whether a docstring that begins with this word says what to do."""
    plain = re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", word) is not None
    ends = word.endswith(("s", "ed", "ing")) and word not in VERBS_IN_S | VERBS_IN_ED
    return plain and NO_VERBS.fullmatch(word) is None and not ends


def public_functions(node, prefix=""):
    for inner in ast.iter_child_nodes(node):
        named = isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if not named or inner.name.startswith("_"):
            continue
        if isinstance(inner, ast.ClassDef):
            yield from public_functions(inner, f"{prefix}{inner.name}.")
        else:
            yield f"{prefix}{inner.name}", inner


SOURCES = [p for p in Path(esegeta.__file__).parent.rglob("*.py") if not p.name.startswith("test_")]


def test_public_docstrings_begin_with_a_verb():
    """A property may be a noun; what it is not, is a question."""
    wrong = []
    for path in SOURCES:
        for name, function in public_functions(ast.parse(path.read_text())):
            text = ast.get_docstring(function)
            if text is None:
                continue
            word = text.split()[0].strip(",:;.")
            noun = any("property" in ast.unparse(d) for d in function.decorator_list)
            if word in ("What", "Whether", "How") or not (noun or is_verb(word)):
                wrong.append(f"{path.name}, line {function.lineno}: {name}: {text.splitlines()[0]}")
    assert not wrong, "begin with a verb:\n" + "\n".join(wrong)


def test_verbs_are_told_from_other_words():
    assert all(map(is_verb, ["Return", "Pass", "Read", "Re-run", "Bring"]))
    assert not any(
        map(is_verb, ["What", "Whether", "The", "Boxes", "Returns", "Shared", "``x", "[0,", "1/n"])
    )
