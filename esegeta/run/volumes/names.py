"""Names of files, in the style of BIDS, made of text that may come from anywhere.

No name here holds a separator of folders, begins with a dot, or is longer than file systems take.
"""

import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from esegeta.engine import check
from esegeta.run.volumes.files import suffix_of
from esegeta.run.volumes.reading import UnreadableInput, shown

LONGEST = 40
_DIGEST = 8
_MOST = 100  # characters of a subject with all its entities: what follows has to find room, too
_LABEL = r"[A-Za-z0-9]{1,60}"
_SUBJECT = re.compile(rf"sub-{_LABEL}(_ses-{_LABEL})?(_[a-z]{{1,20}}-{_LABEL})*")
_ENTITY = re.compile(r"([a-z]{1,20})-(.+)", re.DOTALL)
_PATTERN = 200  # characters of a pattern
_SECONDS = 5.0  # for a pattern to be looked for in all names
_SEARCH = """
import json, re, sys
pattern, texts = json.load(sys.stdin)
found = [re.search(pattern, text) for text in texts]
print(json.dumps([None if one is None or not one.re.groups else one[1] for one in found]))
"""
_OURS = ("space", "label", "chan", "desc")  # entities that the names of our files have themselves


def label(text: str) -> str:
    """Return the letters and digits of a text only, as labels of BIDS are.

    Words are joined with capitals. What has letters beyond ASCII, or was too long, ends with a digest of the whole:
    without it two names could become one.

    Example:
        >>> label("integrated_gradients"), label("links: Ödem"), label("../../x")
        ('integratedGradients', 'linksOdemx398b7e15', 'x')
    """
    joined = _joined(text)
    whole = joined and text.isascii() and len(joined) <= LONGEST
    return joined if whole else _marked(text)


def alike(text: str) -> str:
    """Return what names have in common whose files would be the same, where capitals do not count.

    >>> alike("integrated_gradients") == alike("IntegratedGradients"), alike("a") == alike("b")
    (True, False)
    """
    return label(text).lower()


def _joined(text: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.findall(r"[A-Za-z0-9]+", ascii_only)
    return "".join([*words[:1], *(word[0].upper() + word[1:] for word in words[1:])])


def _marked(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    return f"{_joined(text)[: LONGEST - _DIGEST - 1]}x{digest}"


def subject_label(text: str) -> str:
    """Return a label that tells one subject from every other, whatever others there are.

    Letters and digits stay as they are. Of anything else a digest is added: ``A-1`` and ``A_1`` are two people, and
    neither is ``A1``.

    Example:
        >>> subject_label("A1"), subject_label("A-1"), subject_label("A_1")
        ('A1', 'A1xbc4e7be9', 'A1x47b34af5')
    """
    plain = text.isascii() and text.isalnum() and len(text) <= LONGEST
    return text if plain else _marked(text)


def subject(path: str | Path, pattern: str | None = None) -> str:
    """Return the subject that the name of a file tells, and of that file alone.

    Args:
        path: of an image.
        pattern: a regular expression, whose first group in the name of the file is the subject; one with ``/`` in it
            is looked for in the whole path. Without it the entities of BIDS count, ``sub-`` and with it ``ses-``,
            ``run-`` and so on, else the whole name without its ending.

    Example:
        >>> subject("scans/sub-01_ses-2_T1w.nii.gz"), subject("sub-01_run-2_bold.nii.gz"), subject("P7.nii.gz")
        ('sub-01_ses-2', 'sub-01_run-2', 'sub-P7')
        >>> subject("case 12 (flair).nii", r"case (\\d+)"), subject("scans/12/t1.nii", "([^/]+)/t1")
        ('sub-12', 'sub-12')
    """
    return _told_by_itself(path) if pattern is None else _told_by(pattern, [Path(path)])[0]


def _told_by(pattern: str, paths: Sequence[Path]) -> list[str]:
    told = []
    for path, found in zip(paths, _first_groups(pattern, paths), strict=True):
        if not found:
            advice = "Its first group must be the subject"
            text = check.problem(
                "names.subject", f"a name that {pattern!r} matches", shown(path.name), advice
            )
            raise UnreadableInput(text)
        told.append(f"sub-{subject_label(found.removeprefix('sub-'))}")
    return told


def _first_groups(pattern: str, paths: Sequence[Path]) -> list[str | None]:
    """The first group of a pattern in each name, or in each path, in bounded time.

    Repetitions and alternatives can take exponential time where they do not match, and nothing in this process could
    end that: from two of them on another process looks, which can be ended.
    """
    if len(pattern) > _PATTERN:
        got = f"{len(pattern)} characters"
        text = check.problem(
            "names.subject", f"a pattern of at most {_PATTERN} characters", got, "Shorten it"
        )
        raise UnreadableInput(text)
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        advice = r"Write for example (\d+)"
        got = f"{pattern!r}: {error}"
        raise check.refused("names.subject", "a regular expression", got, advice) from error
    texts = [path.as_posix() if "/" in pattern else path.name for path in paths]
    if sum(map(pattern.count, "*+?{|")) < 2:
        found = map(compiled.search, texts)
        return [None if one is None or not one.re.groups else one[1] for one in found]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([pattern, texts]).encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        expected = f"a pattern that is looked for in {len(texts)} names within {_SECONDS:g} s"
        advice = r"Write it without repetitions inside of repetitions, for example sub-(\d+)"
        raise UnreadableInput(check.problem("names.subject", expected, repr(pattern), advice)) from error
    return list(json.loads(done.stdout))


def _told_by_itself(path: str | Path) -> str:
    name = Path(path).name
    stem = name[: len(name) - len(suffix_of(Path(path)))] or name
    first, *rest = stem.split("_")
    entities = {"sub": first.removeprefix("sub-")} if first.startswith("sub-") else {"sub": stem}
    if entities["sub"] in ("", stem):
        return f"sub-{subject_label(stem)}"
    for part in rest:
        if (found := _ENTITY.fullmatch(part)) is not None and found[1] not in _OURS:
            entities.setdefault(found[1], found[2])
    order = ("sub", *(["ses"] if "ses" in entities else []))
    keys = (*order, *(key for key in entities if key not in order))
    told = "_".join(f"{key}-{subject_label(entities[key])}" for key in keys)
    return told if len(told) <= _MOST else f"sub-{subject_label(stem)}"


def subjects(volumes: Sequence[Sequence[str | Path]], pattern: str | None = None) -> list[str]:
    """Return a subject for each volume. Names never depend on the other volumes: two alike are refused.

    Args:
        volumes: for each the files of its channels; the first one tells the subject.
        pattern: as for ``subject``.

    Example:
        >>> subjects([["y/A-1.nii"], ["y/A1.nii"], ["sub-01_ses-1_T1w.nii"]])
        ['sub-A1xbc4e7be9', 'sub-A1', 'sub-01_ses-1']
    """
    first = [Path(files[0]) for files in volumes]
    found = [_told_by_itself(path) for path in first] if pattern is None else _told_by(pattern, first)
    seen: dict[str, Path] = {}
    for name, path in zip(found, first, strict=True):
        other = seen.setdefault(name.lower(), path)
        if other is not path:
            got = f"{shown(other)} and {shown(path)}, both {name}"
            advice = (
                "Narrow the pattern of the files, or say with input.subject which part of a name or path tells them "
                "apart: '([^/]+)/[^/]+$' takes the name of the folder"
            )
            text = check.problem("names.subjects", "files with a subject each", got, advice)
            raise UnreadableInput(text)
    return found


def name(
    subject: str,
    suffix: str,
    extension: str = "",
    *,
    target: str | None = None,
    channel: int | None = None,
    desc: str | None = None,
) -> str:
    """Return the name of a file on the grid of an image: ``sub-01_space-orig_label-.._desc-.._suffix``.

    Args:
        subject: as ``subject`` gives it; anything else is made so.
        suffix: what kind of thing it is: "statmap", "mask", "overlay"; none if empty.
        extension: with its dot.
        target: what is explained.
        channel: the channel of the map, from 0, where there is a file for each.
        desc: how, the id of a method.

    Example:
        >>> name("sub-01", "statmap", ".nii.gz", target="tumour", desc="smooth_grad")
        'sub-01_space-orig_label-tumour_desc-smoothGrad_statmap.nii.gz'
    """
    parts = [subject_of(subject), "space-orig"]
    parts += [f"label-{label(target)}"] if target is not None else []
    parts += [f"chan-{channel}"] if channel is not None else []
    parts += [f"desc-{label(desc)}"] if desc is not None else []
    parts += [label(suffix)] if suffix else []
    return "_".join(parts) + "".join(f".{label(part)}" for part in extension.split(".") if part)


def subject_of(text: str) -> str:
    """Return a subject's name as it stands if it is one, else made so.

    >>> subject_of("sub-01_ses-2"), subject_of("evil")
    ('sub-01_ses-2', 'sub-evil')
    """
    return text if _SUBJECT.fullmatch(text) else f"sub-{subject_label(text)}"


def folder_of(subject: str) -> Path:
    """Return the folder of a subject, and in it that of the session if there is one.

    >>> folder_of("sub-01_ses-2_run-1").as_posix(), folder_of("sub-01").as_posix()
    ('sub-01/ses-2', 'sub-01')
    """
    first, *rest = subject_of(subject).split("_")
    return Path(first, *[part for part in rest if part.startswith("ses-")])


def anatomy(subject: str) -> Path:
    """Return where the image itself is written, relative to the folder of the run.

    >>> anatomy("sub-01_ses-2").as_posix()
    'sub-01/ses-2/anat/sub-01_ses-2_space-orig_desc-input.nii.gz'
    """
    return folder_of(subject) / "anat" / name(subject, "", ".nii.gz", desc="input")


def statmap(subject: str, target: str, method: str, ending: str = "statmap.nii.gz") -> Path:
    """Return where a map is written, or with another ending what belongs to it.

    >>> statmap("sub-01", "brain", "ig", "montage.png").name
    'sub-01_space-orig_label-brain_desc-ig_montage.png'
    """
    suffix, _, extension = ending.partition(".")
    return folder_of(subject) / name(subject, suffix, f".{extension}", target=target, desc=method)


def prediction(subject: str, target: str) -> Path:
    """Return where the mask of what is predicted is written.

    >>> prediction("sub-01", "brain").name
    'sub-01_space-orig_label-brain_desc-prediction_mask.nii.gz'
    """
    return statmap(subject, target, "prediction", "mask.nii.gz")


def reference(subject: str, target: str) -> Path:
    """Return where the mask of what a given label map shows of a target is written.

    >>> reference("sub-01", "brain").name
    'sub-01_space-orig_label-brain_desc-reference_mask.nii.gz'
    """
    return statmap(subject, target, "reference", "mask.nii.gz")


def job(subject: str, target: str, method: str) -> str:
    """Return the id of a job: safe as the name of a file, and as stable as what it is made of.

    >>> job("sub-01", "brain", "integrated_gradients")
    'sub-01_brain_integratedGradients'
    """
    return f"{subject_of(subject)}_{label(target)}_{label(method)}"


def channels(files: Sequence[str | Path], count: int) -> list[str]:
    """Return a name for each channel of an image: of files what tells them apart, of a picture its colours.

    Args:
        files: that the image was read from, in their order.
        count: how many channels it has.

    Example:
        >>> channels(["a/sub-1_T1w.nii.gz", "a/sub-1_FLAIR.nii.gz"], 2), channels(["cat.png"], 3)
        (['T1w', 'FLAIR'], ['red', 'green', 'blue'])
        >>> channels(["all.nii.gz"], 2)
        ['channel 0', 'channel 1']
    """
    if len(files) == count > 1:
        stems = [Path(name).name.split(".")[0] for name in files]
        parts = [re.split(r"[_-]", stem) for stem in stems]
        shared = set(parts[0]).intersection(*map(set, parts))
        told = ["_".join(part for part in own if part not in shared) for own in parts]
        if all(told) and len(set(told)) == count:
            return told
        return stems if len(set(stems)) == count else [f"channel {i}" for i in range(count)]
    if count == 3 and len(files) == 1 and Path(files[0]).suffix.lower() in (".png", ".jpg", ".jpeg"):
        return ["red", "green", "blue"]
    return [f"channel {i}" for i in range(count)]
