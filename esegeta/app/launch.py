"""Start the server: a port of this machine alone, a file that opens the browser, words on how to get here."""

import contextlib
import fcntl
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn

from esegeta.app import private
from esegeta.app.security import key_page
from esegeta.app.server import Site, app
from esegeta.engine import check

PORT = 8765
_MORE_PORTS = 20  # that are tried after it


def listening(port: int | None) -> socket.socket:
    """Return a socket on a port of this machine; without one the first that is free, from ``PORT``."""
    wanted = [port] if port is not None else [*range(PORT, PORT + _MORE_PORTS), 0]
    for number in wanted:
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", number))
        except OSError as error:
            found.close()
            if number == wanted[-1]:
                got = (error.strerror or str(error)).lower()
                expected = f"port {number} of this machine to be free"
                raise check.refused("app", expected, got, "Choose another --port") from None
            continue
        found.listen(128)
        return found
    raise AssertionError("one port is always wanted")


@contextlib.contextmanager
def alone(site: Site) -> Iterator[None]:
    """Keep a second server out of a folder while this one has it."""
    handle = os.open(site.place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            got = f"a page that is open already; {site.place / 'open.html'} opens it"
            advice = "Use that one, or end it"
            raise check.refused("app", f"{site.state.folder} for itself", got, advice) from None
        yield
    finally:
        os.close(handle)


def away(environment: Mapping[str, str], container: bool) -> bool:
    """Return whether the browser is likely on another machine: in a container, over ssh, in a notebook server."""
    return container or any(name in environment for name in ("SSH_CONNECTION", "JUPYTERHUB_USER"))


def advice(
    port: int, environment: Mapping[str, str], container: bool, key: Path, base: str = "/"
) -> list[str]:
    """Return how to get to the page, in lines.

    >>> print(*advice(8765, {"SSH_CONNECTION": "a 1 b 22", "USER": "me"}, False, Path("/k/open.html"))[:2], sep="\\n")
    The page is at http://127.0.0.1:8765/, for you alone.
    From your own machine: ssh -L 8765:localhost:8765 me@b, then open http://localhost:8765/ there.
    """
    lines = [f"The page is at http://127.0.0.1:{port}{base}, for you alone."]
    if "SSH_CONNECTION" in environment:
        parts = environment["SSH_CONNECTION"].split()
        host = parts[2] if len(parts) > 2 else "HOST"
        whom = f"{environment.get('USER', 'USER')}@{host}"
        lines.append(
            f"From your own machine: ssh -L {port}:localhost:{port} {whom}, "
            f"then open http://localhost:{port}{base} there."
        )
    elif "JUPYTERHUB_USER" in environment:
        lines.append(
            "Behind JupyterHub start it with --base-url and the address under which its proxy shows the port."
        )
    elif container:
        lines.append(
            f"In a container: start that with --network host, or go through it with a tunnel to its port {port}, "
            "for only the machine itself is answered."
        )
    if away(environment, container):
        lines.append(f"It asks for a token, which is in {key.with_name('token')}.")
    else:
        lines.append(f"If no browser opens: open {key} in one. It can only be read by you.")
    return lines


def in_container() -> bool:
    """Return whether this seems to be a container."""
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


def serve(
    site: Site,
    port: int | None = None,
    *,
    browser: bool = True,
    say: Callable[[str], None] = print,
    ready: Callable[[uvicorn.Server], None] | None = None,
) -> None:
    """Answer until it is interrupted. A run that goes on then goes on.

    Args:
        site: of a folder.
        port: of this machine; None for the first that is free.
        browser: whether one is opened.
        say: prints a line.
        ready: called with the server when it is about to answer.
    """
    with alone(site), contextlib.closing(listening(port)) as door:
        number = door.getsockname()[1]
        address = f"http://127.0.0.1:{number}{site.door.base}"
        key = private.written(site.place / "open.html", key_page(address, site.door.token))
        container = in_container()
        for line in advice(number, os.environ, container, key, site.door.base):
            say(line)
        if browser and not away(os.environ, container):
            threading.Timer(0.5, webbrowser.open, [key.as_uri()]).start()
        server = uvicorn.Server(
            uvicorn.Config(
                app(site),
                log_level="warning",
                lifespan="on",
                timeout_graceful_shutdown=2,
                proxy_headers=False,
                server_header=False,
                access_log=False,
            )
        )
        site.ending = lambda: server.should_exit
        if ready is not None:
            ready(server)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[door])
        finally:
            key.unlink(missing_ok=True)
            sys.stdout.flush()
    if site.going.state(site.state.results)["state"] in ("running", "starting"):
        say(f"The run goes on. Look at it or end it: esegeta follow {site.state.results} [--cancel all]")
