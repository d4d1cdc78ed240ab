"""What the page keeps for its owner alone, outside of the folder that it works in: the token, uploads, trials."""

import hashlib
import os
import re
import secrets
import stat
import tempfile
from pathlib import Path

from esegeta.engine import check
from esegeta.run.config.sources import WEIGHTS
from esegeta.run.config.trust import Trust
from esegeta.run.volumes.files import SUFFIXES

# What can be uploaded: images, arrays, and weights, which are read as tensors. No code, and no programs.
UPLOADS = (*SUFFIXES, *(suffix for suffix in WEIGHTS if suffix != ".pt"))
_LONGEST = 150


def folder_for(folder: Path) -> Path:
    """Make the private folder that belongs to a folder of work, readable for its owner alone.

    It lies where the system keeps the state of programs: ``XDG_STATE_HOME``, else ``~/.local/state``.
    """
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = hashlib.sha256(str(Path(os.path.realpath(folder))).encode()).hexdigest()[:16]
    found = home / "esegeta" / name
    found.mkdir(mode=0o700, parents=True, exist_ok=True)
    only_owner(found)
    return found


def only_owner(path: Path) -> None:
    """Refuse a file or folder that others could have made or can read; what is ours is closed to them."""
    about = path.lstat()
    if stat.S_ISLNK(about.st_mode) or about.st_uid != os.getuid():
        got = "a link, or one of somebody else"
        raise check.refused("app", f"{path} to belong to whoever starts the page", got, "Remove it")
    if stat.S_IMODE(about.st_mode) & 0o077:
        path.chmod(stat.S_IMODE(about.st_mode) & 0o700)


def written(path: Path, text: str) -> Path:
    """Write a file that only its owner can read, whatever the umask."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def token(place: Path) -> str:
    """Return the token of a private folder; a server that was killed comes back with the same one."""
    path = place / "token"
    try:
        only_owner(path)
        found = path.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{43}", found):
            return found
    except OSError:
        pass
    found = secrets.token_urlsafe(32)
    written(path, found)
    return found


def uploads(place: Path, trust: Trust) -> Path:
    """Make the folder for uploads where nothing is trusted: what is dropped there must never run.

    In a private folder, else, where the configuration's folder is an ancestor of that, in one for temporary files.
    """
    tried = []
    for where in (place, Path(tempfile.gettempdir()) / f"esegeta-{os.getuid()}" / place.name):
        tried.append(where)
        if not (trust.holds(where) or trust.granted(where)):
            found = where / "uploads"
            found.mkdir(mode=0o700, parents=True, exist_ok=True)
            only_owner(where)
            only_owner(found)
            return found
    got = " and ".join(map(str, tried))
    advice = "Start the page in a folder of its own, and trust less"
    raise check.refused("app", "a place for uploads that is not trusted", got, advice)


def upload_name(name: str) -> str:
    """Return the name under which an upload is kept: what it ends with counts, and no folders.

    >>> upload_name("../../a b<i>.NII.gz")
    'a_b_i_.NII.gz'
    """
    last = re.split(r"[\\/]", name)[-1]
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".")[-_LONGEST:]
    if not safe.lower().endswith(UPLOADS):
        advice = (
            "Code and programs are never uploaded: put them into a folder and trust it on the command line"
        )
        expected = f"a file that ends with one of {', '.join(UPLOADS)}"
        raise check.refused("app", expected, repr(last[:100]), advice)
    return safe
