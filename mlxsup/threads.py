"""Work that blocks, each piece in a thread of its own.

The loop's own pool is the program's: where it has filled that with work, ours would wait for it. A thread of our own is a daemon:
a disk that hangs does not keep the process from ending. None is kept for later, so a child that the program forks misses none.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, TypeVarTuple

from mlxsup.shortages import NoThreadError

T = TypeVar("T")
V = TypeVar("V")
Ts = TypeVarTuple("Ts")


def begin(work: Callable[[*Ts], T], *args: *Ts, name: str = "") -> asyncio.Future[T]:
    """Begin `work` in a thread, with the context of who asks for it; whoever cancels the future leaves it running.

    Raises:
        NoThreadError: nothing was begun.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    arguments = (loop, future, contextvars.copy_context(), work, args)
    thread = threading.Thread(target=_run, args=arguments, name=name or f"mlxsup {_name(work)}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThreadError(str(error)) from error
    return future


async def in_thread(work: Callable[[*Ts], T], *args: *Ts) -> T:
    """Return what `work` returns, or raise what it raises; if this is cancelled, the work goes on.

    Raises:
        NoThreadError: nothing was begun.
    """
    return await begin(work, *args)


async def in_thread_or_here(work: Callable[[*Ts], T], *args: *Ts) -> T:
    """As `in_thread`, for what must be done: where there is no thread to be had, the loop waits for it."""
    try:
        begun = begin(work, *args)
    except NoThreadError:
        return work(*args)
    return await begun


def _name(work: Callable[..., object]) -> str:
    return getattr(work, "__qualname__", type(work).__name__)


def _run(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[T],
    context: contextvars.Context,
    work: Callable[[*Ts], T],
    args: tuple[*Ts],
) -> None:
    try:
        result = context.run(work, *args)
    except StopIteration as error:  # no future takes it
        failure = RuntimeError(f"{_name(work)} raised StopIteration")
        failure.__cause__ = error
        _tell(loop, future, future.set_exception, failure)
    except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
        _tell(loop, future, future.set_exception, error)
    else:
        _tell(loop, future, future.set_result, result)
    finally:
        del future  # a traceback of the error keeps this frame, and the future the error


def _tell(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], settle: Callable[[V], object], outcome: V
) -> None:
    def settle_if_awaited() -> None:
        if not future.done():
            settle(outcome)

    with suppress(RuntimeError):  # the loop is closed: nobody asks any more
        loop.call_soon_threadsafe(settle_if_awaited)
