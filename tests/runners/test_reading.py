"""Bytes come in pieces of bounded size, small ones without waking a task; and where aiohttp is built otherwise, they come all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler

from mlxsup.errors import BadAnswer, Stalled
from mlxsup.runners import probe
from mlxsup.runners.passage import Passage
from mlxsup.runners.reading import PIECE, PieceHandler, Reader, read_in_pieces
from mlxsup.runners.relay import Limits

from .wire_server import CHUNKED, UNTIL_CLOSED, Answering, Exchange, Wire, read_all, saying, wire

pytestmark = pytest.mark.anyio

LINE = b'{"content":"a "}\n'
DONE = b'{"content":"b","done":true,"seed":7}\n'


@pytest.fixture(params=["in pieces", "as aiohttp does"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading; the second is what is left where aiohttp makes its protocols in another place."""
    if request.param == "as aiohttp does":
        monkeypatch.setattr(probe, "read_in_pieces", lambda _: None)


@asynccontextmanager
async def reading(answer: Answering, *, unix: bool = True) -> AsyncIterator[Reader]:
    async with wire(answer, unix=unix) as far, far.session.post(f"{far.address.base_url}/completion") as response:
        yield Reader(response)


async def everything(reader: Reader) -> bytes:
    found = bytearray()

    def take(block: bytes) -> bool:
        found.extend(block)
        return True

    assert not await reader.read(take)
    return bytes(found)


def once_open(write: Callable[[Exchange], None]) -> tuple[Answering, asyncio.Event]:
    """An answer that begins, and goes on with `write` once the event is set."""
    go = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.send(UNTIL_CLOSED)
        await go.wait()
        write(exchange)

    return answer, go


async def test_aiohttp_makes_its_protocols_where_this_is_put_in() -> None:
    """When this fails, aiohttp has changed: `read_in_pieces` does nothing any more, and slow clients cost more memory."""
    async with aiohttp.TCPConnector() as connector:
        assert connector._factory.func is ResponseHandler
        read_in_pieces(connector)
        assert isinstance(connector._factory(), PieceHandler)


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
async def test_no_read_is_longer_than_a_piece(unix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    data_received = ResponseHandler.data_received

    def counted(handler: ResponseHandler, data: bytes) -> None:
        sizes.append(len(data))
        data_received(handler, data)

    monkeypatch.setattr(ResponseHandler, "data_received", counted)
    body = bytes(range(256)) * 16384
    async with reading(saying(UNTIL_CLOSED, body), unix=unix) as reader:
        assert await everything(reader) == body
    assert PIECE // 2 < max(sizes) <= PIECE


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("size", [1, 100, 5000, 300_000])
async def test_all_bytes_come_in_order(size: int) -> None:
    pieces = [bytes([65 + number]) * size for number in range(20)]
    async with reading(saying(UNTIL_CLOSED, *pieces)) as reader:
        assert await everything(reader) == b"".join(pieces)


async def test_what_is_small_is_taken_without_a_task() -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(UNTIL_CLOSED)
        for _ in range(3):
            await go.acquire()
            await exchange.send(LINE)

    def take(_: bytes) -> bool:
        tasks.append(asyncio.current_task())
        go.release()
        return True

    go, tasks = asyncio.Semaphore(0), list[object]()
    async with reading(answer) as reader:
        asyncio.get_running_loop().call_soon(go.release)  # once it waits
        assert not await reader.read(take)
    assert tasks == [None, None, None]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("ahead", [True, False])
async def test_who_wants_no_more_gets_no_more(size: int, ahead: bool) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(UNTIL_CLOSED)
        for number in range(3):
            await exchange.send(bytes([65 + number]) * size)
            await go.acquire()

    go, found = asyncio.Semaphore(0), bytearray()
    async with reading(answer) as reader:
        while await reader.read(found.extend):
            if len(found) % size == 0:
                before = len(found)
                asyncio.get_running_loop().call_soon(go.release)
                if ahead:
                    await asyncio.sleep(0.01)  # there is more now, and nobody asked for it
                    assert len(found) == before
    assert found == b"A" * size + b"B" * size + b"C" * size


@pytest.mark.usefixtures("ways")
async def test_what_the_taker_raises_is_raised_where_it_was_asked() -> None:
    def take(_: bytes) -> bool:
        raise LookupError("mine")

    answer, go = once_open(lambda exchange: exchange._writer.write(LINE))
    async with reading(answer) as reader:
        asyncio.get_running_loop().call_soon(go.set)  # once it waits
        with pytest.raises(LookupError, match="mine"):
            await reader.read(take)


@pytest.mark.usefixtures("ways")
async def test_who_was_cancelled_takes_nothing_any_more() -> None:
    found: list[bytes] = []
    answer, go = once_open(lambda exchange: exchange._writer.write(LINE))
    async with reading(answer) as reader:
        task = asyncio.create_task(reader.read(found.append))
        await asyncio.sleep(0)
        task.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert found == []
        assert await everything(reader) == LINE


@pytest.mark.usefixtures("ways")
async def test_a_reading_that_is_broken_off_ends_at_once() -> None:
    answer, go = once_open(lambda _: None)
    async with reading(answer) as reader:
        asyncio.get_running_loop().call_soon(reader.break_off, LookupError("enough"))
        async with asyncio.timeout(10):
            with pytest.raises(LookupError, match="enough"):
                await reader.read(lambda _: True)
        go.set()


@pytest.mark.usefixtures("ways")
class TestAnswers:
    """What matters most about answers, both ways."""

    @pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
    async def test_whole(self, unix: bool) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE, LINE + DONE), unix=unix) as far:
            assert [chunk.content for chunk in await read_all(await far.post())] == ["a ", "a ", "b"]
            assert await _passed(far) == LINE + LINE + DONE

    async def test_cut(self) -> None:
        async with wire(saying(CHUNKED + b"%x\r\n%b\r\n" % (len(LINE), LINE))) as far:
            with pytest.raises(BadAnswer):
                await read_all(await far.post())
            with pytest.raises(BadAnswer):
                await _passed(far)

    async def test_silent(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED + LINE)
            await exchange.client_left()

        async with wire(answer) as far:
            with pytest.raises(Stalled, match=r"nothing more for 0\.1 s"):
                await read_all(await far.post(limits=Limits(first_chunk=15, silence=0.1)))
            with pytest.raises(Stalled, match=r"nothing more for 0\.1 s"):
                await _passed(far, Limits(first_chunk=15, silence=0.1))

    async def test_slow_for_longer_than_it_may_be_silent(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED)
            for _ in range(8):
                await asyncio.sleep(0.2)  # slow on purpose: this is what is tested
                await exchange.send(LINE)
            await exchange.send(DONE)

        async with wire(answer) as far:
            assert await _passed(far, Limits(first_chunk=15, silence=1.0)) == 8 * LINE + DONE

    async def test_who_takes_slowly_is_not_kept_waiting_by_silence(self) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE, 100_000 * LINE + DONE)) as far:
            passage = Passage(await far.post(limits=Limits(first_chunk=15, silence=0.2)), None)
            found: list[bytes] = []
            while await passage.pass_on(found.append):
                if len(found) < 3:
                    await asyncio.sleep(0.4)  # slow on purpose: this is what is tested
            assert b"".join(found) == 100_001 * LINE + DONE

    async def test_nothing_but_blank_lines_is_silence(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED + LINE)
            for _ in range(200):
                await asyncio.sleep(0.02)
                await exchange.send(b"\n")

        async with wire(answer) as far:
            with pytest.raises(Stalled, match=r"nothing more for 0\.5 s"):
                await _passed(far, Limits(first_chunk=15, silence=0.5))


async def _passed(far: Wire, limits: Limits | None = None) -> bytes:
    found = bytearray()

    def take(block: bytes) -> bool:
        found.extend(block)
        return True

    answer = await (far.post() if limits is None else far.post(limits=limits))
    assert not await Passage(answer, None).pass_on(take)
    return bytes(found)
