"""The runner process: binds its address, then loads one model and serves it until it is told to end.

The address is bound before anything slow is imported, so that whoever started this process can connect from then on.
Lines on stderr are plain text, one an event; the last one says why a runner that failed did so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket as sockets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsup.imagegen.pipelines.catalog import resolve
from mlxsup.imagegen.pipelines.selection import Adaptation, NoSuchModelError, paired

if TYPE_CHECKING:
    from mlxsup.imagegen.service import Service

SUPERVISOR_PID = "MLXSUP_SUPERVISOR_PID"
"""Environment variable: the process whose child this is. When that is no longer so, the runner ends."""

BACKLOG = 128


def main(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int | None,
    socket: str | None,
    ready_fd: int | None = None,
    max_pixels: int | None = None,
    quantize: int | None = None,
    lora_paths: Sequence[str] = (),
    lora_scales: Sequence[float] = (),
) -> int:
    """Serve one model until SIGINT, SIGTERM, or the supervisor's end.

    Call it in the main thread of a process of its own. It takes over signals and logging, and once it has served it ends
    the process itself: with code 0 after a signal or the supervisor's end, 1 when the model could not be loaded or its thread
    broke.

    Args:
        model: `builtin:emoji`, the folder of a pipeline, or `ORG/NAME` of the Hugging Face cache.
        host: address to listen on, with `port`.
        port: TCP port; 0 takes a free one, which the log names.
        socket: path of a unix socket, instead of a port.
        ready_fd: inherited descriptor that gets one byte, and is closed, as soon as the model is loaded.
        max_pixels: width x height of the largest picture that is made; None leaves that to the pipeline.
        quantize: bits of a weight, of `selection.BITS`; None leaves them as they are stored.
        lora_paths: files of LoRAs to add to the weights.
        lora_scales: how strongly, one for each; none at all stands for 1.

    Returns:
        1, with one line on stderr, when there is nothing to serve: the name means no model, or the address is taken.
    """
    # Until the event loop takes the signals over, there is no work to give up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    logging.raiseExceptions = False  # a supervisor that is gone leaves a broken pipe for stderr
    try:
        load = resolve(model, Adaptation(quantize, paired(lora_paths, lora_scales)))
        supervisor = _supervisor_pid()
        if max_pixels is not None and max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, not {max_pixels}")
    except (NoSuchModelError, ValueError) as error:
        return _failed(str(error))
    try:
        listener = _unix_listener(socket) if socket is not None else _tcp_listener(host, port)
    except (OSError, OverflowError) as error:
        where = socket if socket is not None else f"{host}:{port}"
        return _failed(f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}")

    from mlxsup.imagegen.service import Service  # imports aiohttp

    service = Service(
        load, model=model, max_pixels=max_pixels, listener=listener, ready_fd=ready_fd, supervisor=supervisor
    )
    try:
        failure = asyncio.run(_until_signalled(service))
    finally:
        if socket is not None:
            with suppress(OSError):
                Path(socket).unlink()
    code = _failed(failure) if failure else 0
    # No return: a step in work cannot be interrupted, and where an interpreter winds down around MLX's own threads, idle
    # ones too, the process now and then aborts.
    logging.shutdown()
    os._exit(code)


async def _until_signalled(service: Service) -> str | None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, service.end)
    return await service.serve()


def _failed(why: str) -> int:
    logging.getLogger(__name__).error("mlxsup runner: %s", why)
    return 1


def _supervisor_pid() -> int | None:
    value = os.environ.get(SUPERVISOR_PID, "")
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"{SUPERVISOR_PID} must be a process id, not {value!r}")
    return int(value)


def _tcp_listener(host: str, port: int | None) -> sockets.socket:
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    listener = sockets.socket(family, sockets.SOCK_STREAM)
    try:
        # No SO_REUSEPORT: two runners on one port must not share its requests in silence.
        listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        listener.bind((host, port or 0))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    if not port:
        logging.getLogger(__name__).info("listening on %s:%d", host, listener.getsockname()[1])
    return listener


def _unix_listener(path: str) -> sockets.socket:
    """Listen on `path`, readable by this user alone; a socket that nobody answers on any more is replaced."""
    listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        if _is_stale(path):
            Path(path).unlink()
        listener.bind(path)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _is_stale(path: str) -> bool:
    if not Path(path).is_socket():
        return False
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False
