"""Opens the sockets of the daemon, and says who has an address that is taken.

A unix socket whose daemon is gone is told from one whose daemon is busy by trying. macOS refuses both alike: there a daemon holds
a lock on a file beside its socket for as long as it lives, and removes no socket without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import aiohttp

from mlxsup.config import Listen, parse_listen
from mlxsup.daemon.addresses import WILDCARDS, local_url, written
from mlxsup.errors import ConfigError, Conflict
from mlxsup.threads import in_thread, in_thread_or_here

_BACKLOG: Final = 512
_REFUSES_WHEN_FULL: Final = sys.platform == "darwin"
_ASK_TIMEOUT: Final = aiohttp.ClientTimeout(total=1.0)


class _Taken(Exception):
    """Somebody listens there already."""


@contextlib.asynccontextmanager
async def listening(addresses: Iterable[str]) -> AsyncIterator[list[socket.socket]]:
    """Hold listening sockets for all addresses; connections wait in them until they are served.

    Of a name that stands for several addresses, those that this machine has are taken. What is given twice is opened once.

    A unix socket has mode 0600. One that an earlier life left behind is replaced, one that answers never is. On macOS a file
    `<socket>.lock` stays beside it.

    Raises:
        Conflict: an address is taken; the message says by whom, and what to do.
        ConfigError: an address cannot be listened on.
        ValueError: an address is none; a configuration that was read has no such.
    """
    stack = contextlib.ExitStack()
    try:
        sockets: list[socket.socket] = []
        for address in map(parse_listen, addresses):
            try:
                if address.path:
                    sockets += await in_thread(_open_unix, address, sockets, stack)
                else:
                    sockets += await in_thread(_open_tcp, address, sockets, stack)
            except _Taken:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                if address.host in WILDCARDS and any(
                    sock.family == family and _port(sock) == address.port for sock in sockets
                ):
                    why = "another address of the list is a part of it"
                    raise ConfigError(f"server.listen: cannot listen on {written(address)}: {why}") from None
                raise await _conflict(address) from None
            except OSError as error:
                why = error.strerror or str(error)
                raise ConfigError(f"server.listen: cannot listen on {written(address)}: {why}") from error
        yield sockets
    finally:
        await in_thread_or_here(stack.close)


def _open_tcp(address: Listen, held: Iterable[socket.socket], stack: contextlib.ExitStack) -> list[socket.socket]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened: list[socket.socket] = []
    covered = False
    lacking: OSError | None = None
    for family, _, _, _, target in dict.fromkeys(found):
        if any(_covers(sock, family, target[0], address.port) for sock in held):
            covered = True
            continue
        try:
            opened.append(stack.enter_context(_listener(family, target)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _Taken from error
            if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                raise
            lacking = error  # `localhost` on a machine without IPv6
    if lacking is not None and not opened and not covered:
        raise lacking
    return opened


def _listener(family: int, target: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(target)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _covers(sock: socket.socket, family: int, host: str | int, port: int) -> bool:
    """Tell whether a socket listens there already, by this address or by all of its kind."""
    return sock.family == family and port != 0 and _port(sock) == port and sock.getsockname()[0] in {host, *WILDCARDS}


def _port(sock: socket.socket) -> int | None:
    return None if sock.family == socket.AF_UNIX else sock.getsockname()[1]


def _open_unix(address: Listen, held: Iterable[socket.socket], stack: contextlib.ExitStack) -> list[socket.socket]:
    path = address.path
    if any(sock.getsockname() == path for sock in held):
        return []
    if _REFUSES_WHEN_FULL:
        _lock(f"{path}.lock", stack)
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        _bind_private(sock, path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale(path)
        _bind_private(sock, path)
    sock.listen(_BACKLOG)
    stack.callback(_remove_own, path, os.stat(path).st_ino)
    return [sock]


def _lock(path: str, stack: contextlib.ExitStack) -> None:
    """Lock a file until the stack is closed; it is never removed, as another one may have it open to lock it next."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _Taken from error


def _bind_private(sock: socket.socket, path: str) -> None:
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _remove_stale(path: str) -> None:
    """Remove the socket of a daemon that is gone; whatever answers, or is no socket, stays."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "a file that is no socket is in the way")
    for pause in (0.0, 0.1):  # twice: one that starts at the same time is bound before it listens
        time.sleep(pause)
        if _answers(path):
            raise _Taken
    os.unlink(path)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except (TimeoutError, BlockingIOError):  # its queue is full
            return True
    return True


def _remove_own(path: str, inode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


async def _conflict(address: Listen) -> Conflict:
    owner = await _owner(address)
    if owner:
        mend = "use it (mlxsup ps), stop it"
        return Conflict(
            f"{written(address)} is taken: {owner} already serves there; {mend}, or give --listen another address"
        )
    return Conflict(f"{written(address)} is taken by another program; end that, or give --listen another address")


async def _owner(address: Listen) -> str:
    """Name the mlxsup that answers on `address`, or return "" when it is something else."""
    connector = aiohttp.UnixConnector(address.path) if address.path else aiohttp.TCPConnector()
    url = "http://localhost" if address.path else local_url(address)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=_ASK_TIMEOUT) as session,
            session.get(f"{url}/version") as response,
        ):
            found = await response.json(content_type=None)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return ""
    if not isinstance(found, dict) or found.get("name") != "mlxsup":
        return ""
    return f"mlxsup {found.get('version', '')}".strip()
