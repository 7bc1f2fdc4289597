"""Work in threads of its own: neither waits for what the program does in its pool, nor loses what comes of it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from mlxsup.errors import LoadTimeout
from mlxsup.testing import fake_runner
from mlxsup.threads import begin, in_thread, in_thread_or_here
from tests.faults.house import alive, collect, report, state_is, supervisor, words
from tests.waiting import LIMIT, until

pytestmark = pytest.mark.anyio

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """What holds up threads until the test is over."""
    event = threading.Event()
    yield event
    event.set()


@asynccontextmanager
async def filled_pool() -> AsyncIterator[None]:
    """A program that has filled its loop's pool with work that does not end."""
    event = threading.Event()
    work = [asyncio.create_task(asyncio.to_thread(event.wait)) for _ in range(64)]
    try:
        await asyncio.sleep(0)
        yield
    finally:
        event.set()
        await asyncio.wait(work)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlxsup ")]


async def test_a_program_that_fills_its_pool_holds_up_no_life_of_a_runner() -> None:
    async with filled_pool(), supervisor(m=fake_runner(address="tcp")) as sup:
        with anyio.fail_after(LIMIT):
            await sup.load("m")
            assert words(await collect(sup)) == "t1 t2 t3 "
            first = report(sup).pid
            os.kill(first, signal.SIGKILL)
            await state_is(sup, "failed")
            await sup.load("m")
            second = report(sup).pid
            await sup.unload("m")
    assert not alive(first)
    assert not alive(second)


async def test_a_program_that_fills_its_pool_puts_no_deadline_off() -> None:
    async with filled_pool(), supervisor(m=fake_runner("hang@bind", load_timeout="1s")) as sup:
        began = time.monotonic()
        with anyio.fail_after(LIMIT), pytest.raises(LoadTimeout):
            await sup.load("m")
        assert time.monotonic() - began < LIMIT


async def test_what_it_returns_and_raises_comes_through() -> None:
    def fail() -> None:
        raise ZeroDivisionError("why")

    assert await in_thread(divmod, 7, 2) == (3, 1)
    for way in (in_thread, in_thread_or_here):
        with pytest.raises(ZeroDivisionError, match="why"):
            await way(fail)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
async def test_no_kind_of_end_is_lost(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind

    begun = begin(fail)
    await asyncio.wait({begun}, timeout=LIMIT)
    assert isinstance(begun.exception(), kind)


async def test_the_end_of_an_iterator_comes_as_an_error_that_a_future_takes() -> None:
    with anyio.fail_after(LIMIT), pytest.raises(RuntimeError, match="next raised StopIteration"):
        await in_thread(next, iter(()))


async def test_it_has_the_context_of_who_asks_and_a_name_of_ours() -> None:
    def look() -> tuple[str, str, bool]:
        thread = threading.current_thread()
        return WHO.get(), thread.name, thread.daemon

    WHO.set("me")
    who, name, daemon = await in_thread(look)
    assert (who, daemon) == ("me", True)
    assert name.startswith("mlxsup ")
    assert name.endswith("look")


async def test_who_leaves_waits_for_nothing_and_the_work_goes_on(held: threading.Event) -> None:
    done: list[bool] = []

    def work() -> None:
        done.append(held.wait(LIMIT))

    waiting = asyncio.create_task(in_thread(work))
    await until(ours)
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=LIMIT)
    assert waiting.cancelled()
    assert not done
    held.set()
    await until(lambda: done and not ours())
    assert done == [True]


async def test_without_threads_it_says_so_or_does_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await in_thread(done.append, 1)
        await in_thread_or_here(done.append, 2)
    assert done == [2]


async def test_what_fails_by_itself_is_not_done_twice() -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        await in_thread_or_here(fail)
    assert tries == [1]


async def test_an_error_keeps_nothing_alive_beyond_itself() -> None:
    class Error(Exception):
        pass

    def fail() -> None:
        raise Error

    gc.disable()
    try:
        begun = begin(fail)
        await asyncio.wait({begun}, timeout=LIMIT)
        await until(lambda: not ours())
        future, error = weakref.ref(begun), weakref.ref(begun.exception() or begun)
        del begun
        assert (future(), error()) == (None, None)
    finally:
        gc.enable()


def test_an_end_after_that_of_the_loop_is_nobodys(held: threading.Event) -> None:
    async def leave() -> None:
        begin(held.wait, LIMIT)

    asyncio.run(leave())
    (thread,) = ours()
    held.set()
    thread.join(LIMIT)
    assert not thread.is_alive()  # an error of it would fail the test
