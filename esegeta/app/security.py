"""Who may ask the server for something, and which files it may name.

A page on the same machine is reached by every other page that a browser has open, and by every user of the machine.
So everything needs a token that only the owner of the server can read; the name under which the server is asked for
has to be one of this machine (else a foreign name could be pointed here); and what changes something has to come from
the page itself.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esegeta.engine import check

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SAFE = ("GET", "HEAD")
SESSION = "/api/session"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")

LOGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>esegeta</title></head><body>
<h1>esegeta</h1>
<p>This page is for whoever has started it. The command line says which file to open, or where the token is.</p>
<form method="post" action="api/session"><label>Token <input name="token" type="password" autocomplete="off"></label>
<button>Open</button></form></body></html>"""

ENTER = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=../">
<title>esegeta</title></head><body><p><a href="../">Go to the page</a></p></body></html>"""


@dataclass(frozen=True)
class Door:
    """What opens the server.

    token: of its owner; base: the path in front of every route, as a proxy has it, ending in a slash; host, origin:
    of that proxy, empty for none.
    """

    token: str
    base: str = "/"
    host: str = ""
    origin: str = ""
    cookie: str = field(init=False)
    session: str = field(init=False)

    def __post_init__(self) -> None:
        # Cookies of all ports of a machine are in one jar: each token has a name of its own.
        name = hashlib.sha256(b"name" + self.token.encode()).hexdigest()[:12]
        session = hmac.new(self.token.encode(), b"session", hashlib.sha256).hexdigest()
        object.__setattr__(self, "cookie", f"esegeta_{name}")
        object.__setattr__(self, "session", session)


def door(token: str, base_url: str = "/") -> Door:
    """Return what opens a server behind a base: a path, or the whole address as a proxy shows it.

    >>> door("t", "https://hub.example.org/user/me/proxy/8765").base
    '/user/me/proxy/8765/'
    >>> door("t", "https://hub.example.org/a").origin
    'https://hub.example.org'
    """
    parts = urlsplit(base_url)
    whole = bool(parts.scheme or parts.netloc)
    path = f"/{parts.path.strip('/')}/".replace("//", "/")
    wrong = whole and (parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.netloc.lower()))
    if wrong or parts.query or parts.fragment or not re.fullmatch(r"[A-Za-z0-9/._~@%-]+", path):
        advice = "Write for example /user/me/proxy/8765/ or https://hub.example.org/user/me/proxy/8765/"
        raise check.refused("app", "--base-url to be a path or an address", repr(base_url), advice)
    if not whole:
        return Door(token, path)
    host = parts.netloc.lower()
    return Door(token, path, host, f"{parts.scheme}://{host}")


def of_this_machine(host: str) -> bool:
    """Return whether the header ``Host`` names this machine, with whatever port: a tunnel has another one.

    >>> of_this_machine("localhost:9000"), of_this_machine("[::1]:80"), of_this_machine("evil.example")
    (True, True, False)
    """
    found = _HOST.fullmatch(host.lower())
    return found is not None and found[1] in LOOPBACK


def cookies(header: str) -> dict[str, str]:
    """Return the cookies of a header.

    >>> cookies("a=1; b=2")
    {'a': '1', 'b': '2'}
    """
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return {name: value for name, _, value in pairs if name}


def refusal(method: str, path: str, headers: Mapping[str, str], door: Door) -> tuple[int, str] | None:
    """Return why a request is refused, as status and reason; None if it is not.

    Args:
        method: of HTTP.
        path: without the base.
        headers: by their names in lower case.
        door: what opens the server.
    """
    host, origin = headers.get("host", "").lower(), headers.get("origin")
    if not (of_this_machine(host) or (door.host and host == door.host)):
        return 403, f"expected a name of this machine as Host, got {host[:100]!r}. Open the page as localhost"
    entering = path == SESSION and method == "POST"  # the token is in it: it may come from a file
    own = {f"http://{host}", f"https://{host}", door.origin} - {""}
    if origin is not None and origin.lower() not in own and not (entering and origin == "null"):
        return 403, f"expected a request of the page itself, got one of {origin[:100]!r}"
    opening = method == "GET" and path == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not (entering or opening):
        return 403, "expected a request of the page itself, got one of another page"
    if entering:
        return None
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), door.token.encode()):
        return None
    session = cookies(headers.get("cookie", "")).get(door.cookie, "")
    if not hmac.compare_digest(session.encode(), door.session.encode()):
        return 401, "expected the token of the owner, got none that fits. The command line says where it is"
    if method not in SAFE and origin is None:
        return 403, "expected a request of the page itself, got one that does not say where it comes from"
    return None


class Guard:
    """Let through what ``refusal`` has nothing against, and put the headers of safety on every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError("app: expected HTTP, got another protocol. Reload the page.")
        scope = {**scope, "path": self._path(scope["path"])}
        headers = Headers(scope=scope)
        known = {name: ", ".join(headers.getlist(name)) for name in headers}
        found = refusal(scope["method"], scope["path"], known, self.door)

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                if b"cache-control" not in own:
                    more.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *more]
            await send(message)

        if found is None:
            await self.app(scope, receive, protected)
            return
        status, reason = found
        page = status == 401 and scope["path"] == "/"
        answer: Response = (
            HTMLResponse(LOGIN, status) if page else JSONResponse({"error": f"app: {reason}."}, status)
        )
        await answer(scope, receive, protected)

    def _path(self, path: str) -> str:
        """Return a path without the base, which some proxies leave in front and others take away."""
        return path[len(self.door.base) - 1 :] if path.startswith(self.door.base) else path


def entered(door: Door) -> HTMLResponse:
    """Return the answer to the right token: the cookie, and the way to the page."""
    answer = HTMLResponse(ENTER)
    secure = door.origin.startswith("https:")
    answer.set_cookie(
        door.cookie, door.session, path=door.base, httponly=True, samesite="strict", secure=secure
    )
    return answer


def key_page(address: str, token: str) -> str:
    """Return the page that opens the server, for a file that only the owner can read: all can see command lines."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>esegeta</title></head><body>'
        f'<form method="post" action="{escape(address)}api/session">'
        f'<input type="hidden" name="token" value="{escape(token)}"><button>Open esegeta</button></form>'
        "<script>document.forms[0].submit();</script></body></html>"
    )


# --- Files ------------------------------------------------------------------------------------------------


class ForbiddenError(ValueError):
    """A file that the page may not name."""


class Folders(NamedTuple):
    """The folders that the page may look into, as real paths."""

    roots: tuple[Path, ...]

    def real(self, path: str | Path) -> Path:
        """Return the real path of a file or folder in one of them, links followed; else refuse it."""
        text = str(path)
        if "\0" in text:
            raise ForbiddenError(check.problem("app", "a path", "one with a zero byte", "Check it"))
        found = Path(os.path.realpath(os.path.expanduser(text)))
        if not self.hold(found):
            shown = ", ".join(map(str, self.roots))
            advice = "Start with --browse FOLDER to look into more of them"
            raise ForbiddenError(check.problem("app", f"a path in {shown}", repr(text[:200]), advice))
        return found

    def hold(self, real: Path) -> bool:
        """Return whether a real path lies in one of them, and is not hidden there."""
        above = [root for root in self.roots if root == real or root in real.parents]
        return any(not any(part.startswith(".") for part in real.relative_to(root).parts) for root in above)

    def listing(self, path: str | Path) -> dict[str, Any]:
        """Return what is in a folder: folders, then files, without what leads out of the allowed ones."""
        folder = self.real(path)
        entries = []
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    if entry.name.startswith(".") or not self.hold(Path(os.path.realpath(entry.path))):
                        continue
                    is_folder = entry.is_dir()
                    size = None if is_folder else entry.stat().st_size
                    entries.append(
                        {
                            "name": entry.name,
                            "path": str(folder / entry.name),
                            "folder": is_folder,
                            "size": size,
                        }
                    )
        except OSError as error:
            got = (error.strerror or str(error)).lower()
            raise ForbiddenError(check.problem("app", f"a folder {str(path)!r}", got, "Check it")) from None
        entries.sort(key=lambda one: (not one["folder"], str(one["name"]).lower()))
        parent = str(folder.parent) if self.hold(folder.parent) else None
        return {
            "path": str(folder),
            "parent": parent,
            "roots": list(map(str, self.roots)),
            "entries": entries,
        }
