"""Names of files, in the style of BIDS, made of text that may come from anywhere.

No name here holds a separator of folders, begins with a dot, or is longer than file systems take.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from esegeta.engine import check
from esegeta.run.reading import UnreadableInput, shown
from esegeta.run.volumes import suffix_of

LONGEST = 40
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]{1,60}(_ses-[A-Za-z0-9]{1,60})?")
_ENTITY = re.compile(r"(sub|ses)-([A-Za-z0-9]{1,60})(?![A-Za-z0-9])")


def label(text: str) -> str:
    """Letters and digits only, as labels of BIDS are.

    Accents go, words are joined with capitals, and what was too long is cut and ends with a digest of the whole.

    Example:
        >>> label("integrated_gradients"), label("Gehirn, links: Ödem"), label("../../x")
        ('integratedGradients', 'GehirnLinksOdem', 'x')
    """
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.findall(r"[A-Za-z0-9]+", ascii_only)
    joined = "".join([*words[:1], *(word[0].upper() + word[1:] for word in words[1:])])
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    if not joined:
        return f"x{digest}"  # a name in another script still has one of its own
    return joined if len(joined) <= LONGEST else joined[: LONGEST - len(digest)] + digest


def labels(texts: Iterable[str]) -> dict[str, str]:
    """A label for each of several texts, no two alike, also where capitals do not count.

    Example:
        >>> labels(["a_b", "aB", "c"])
        {'a_b': 'aB', 'aB': 'aB2', 'c': 'c'}
    """
    found: dict[str, str] = {}
    for text in texts:
        if text not in found:
            found[text] = _free(label(text), found.values())
    return found


def _free(wanted: str, taken: Iterable[str]) -> str:
    used = {name.lower() for name in taken}
    choices = (f"{wanted}{i or ''}" for i in (0, *range(2, len(used) + 3)))
    return next(choice for choice in choices if choice.lower() not in used)


def subject(path: str | Path, pattern: str | None = None) -> str:
    """The subject that the name of a file tells.

    Args:
        path: of an image.
        pattern: a regular expression, whose first group in the name of the file is the subject. Without it the
            entities ``sub-`` and ``ses-`` of BIDS count, else the whole name without its ending.

    Example:
        >>> subject("scans/sub-01_ses-2_T1w.nii.gz"), subject("colin27_t1.nii.gz")
        ('sub-01_ses-2', 'sub-colin27T1')
        >>> subject("case 12 (flair).nii", r"case (\\d+)")
        'sub-12'
    """
    name = Path(path).name
    stem = name[: len(name) - len(suffix_of(Path(path)))] or name
    if pattern is not None:
        try:
            found = re.search(pattern, name)
        except re.error as error:
            advice = r"Write for example (\d+)"
            text = check.problem("names.subject", "a regular expression", f"{pattern!r}: {error}", advice)
            raise ValueError(text) from error
        if found is None or not found.re.groups or not found[1]:
            advice = "Its first group must be the subject"
            text = check.problem("names.subject", f"a name that {pattern!r} matches", shown(name), advice)
            raise UnreadableInput(text)
        return f"sub-{label(found[1].removeprefix('sub-'))}"
    entities = dict(_ENTITY.findall(stem))
    if "sub" not in entities:
        return f"sub-{label(stem)}"
    return f"sub-{entities['sub']}" + (f"_ses-{entities['ses']}" if "ses" in entities else "")


def subjects(volumes: Sequence[Sequence[str | Path]], pattern: str | None = None) -> list[str]:
    """A subject for each volume, no two alike: those of one name take that of their file and folder along.

    Args:
        volumes: for each the files of its channels; the first one tells the subject.
        pattern: as for ``subject``.

    Example:
        >>> subjects([["a/scan.nii"], ["b/scan.nii"], ["sub-01_T1w.nii"], ["sub-01_T2w.nii"]])
        ['sub-aScan', 'sub-bScan', 'sub-01T1w', 'sub-01T2w']
    """
    first = [Path(files[0]) for files in volumes]
    found = [subject(path, pattern) for path in first]
    for longer in (lambda p: p.name, lambda p: f"{p.absolute().parent.name} {p.name}"):
        counts = [[name.lower() for name in found].count(name.lower()) for name in found]
        stems = [
            longer(path)[: -len(suffix_of(path)) or None].removeprefix("sub-").replace(" sub-", " ")
            for path in first
        ]
        found = [
            f"sub-{label(stem)}" if count > 1 else name
            for name, stem, count in zip(found, stems, counts, strict=True)
        ]
    unique: list[str] = []
    for name in found:
        unique.append(_free(name, unique))
    return unique


def name(
    subject: str,
    suffix: str,
    extension: str = "",
    *,
    target: str | None = None,
    channel: int | None = None,
    desc: str | None = None,
) -> str:
    """The name of a file of a subject on the grid of its image: ``sub-01_space-orig_label-.._desc-.._suffix``.

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
    """A subject's name as it stands if it is one, else made so.

    >>> subject_of("sub-01_ses-2"), subject_of("../evil")
    ('sub-01_ses-2', 'sub-evil')
    """
    return text if _SUBJECT.fullmatch(text) else f"sub-{label(text)}"


def anatomy(subject: str) -> Path:
    """Where the image itself is written, relative to the folder of the run.

    >>> anatomy("sub-01").as_posix()
    'sub-01/anat/sub-01_space-orig_desc-input.nii.gz'
    """
    return Path(subject_of(subject)) / "anat" / name(subject, "", ".nii.gz", desc="input")


def statmap(subject: str, target: str, method: str, ending: str = "statmap.nii.gz") -> Path:
    """Where a map is written, or with another ending what belongs to it.

    >>> statmap("sub-01", "brain", "ig", "montage.png").name
    'sub-01_space-orig_label-brain_desc-ig_montage.png'
    """
    suffix, _, extension = ending.partition(".")
    return Path(subject_of(subject)) / name(subject, suffix, f".{extension}", target=target, desc=method)


def prediction(subject: str, target: str) -> Path:
    """Where the mask of what is predicted is written.

    >>> prediction("sub-01", "brain").name
    'sub-01_space-orig_label-brain_desc-prediction_mask.nii.gz'
    """
    return statmap(subject, target, "prediction", "mask.nii.gz")


def job(subject: str, target: str, method: str) -> str:
    """The id of a job: safe as the name of a file, and as stable as what it is made of.

    >>> job("sub-01", "brain", "integrated_gradients")
    'sub-01_brain_integratedGradients'
    """
    return f"{subject_of(subject)}_{label(target)}_{label(method)}"
