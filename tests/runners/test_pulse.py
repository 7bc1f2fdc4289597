"""What an answer tells of its runner's work: who listens at a time, and who left before the end."""

from __future__ import annotations

import asyncio

import pytest

from mlxsup.errors import BadAnswer, MlxsupError, Stalled
from mlxsup.runners.passage import Passage
from mlxsup.runners.relay import Limits
from tests.waiting import until

from .wire_server import CHUNKED, UNTIL_CLOSED, WIDE, Exchange, Wire, read_all, saying, wire

pytestmark = pytest.mark.anyio

LINE = b'{"content":"a "}\n'
DONE = b'{"content":"b","done":true}\n'


async def one_line(exchange: Exchange) -> None:
    """Say a little, then nothing until the other side leaves."""
    await exchange.send(CHUNKED)
    await exchange.chunk(LINE)
    await exchange.client_left()


async def no_line(exchange: Exchange) -> None:
    await exchange.send(CHUNKED)
    await exchange.client_left()


async def silent(exchange: Exchange) -> None:
    await exchange.client_left()


def works_for_nobody(far: Wire) -> bool:
    return left(far)


def counts(far: Wire) -> tuple[int, int, int]:
    return far.pulse.answering, far.pulse.waiting, far.pulse.listening


def left(far: Wire) -> bool:
    return far.pulse.works_for_nobody


@pytest.mark.parametrize("way", ["chunks", "bytes"])
async def test_who_waits_for_a_chunk_listens_and_who_has_one_does_not(way: str) -> None:
    async with wire(one_line) as far:
        answer = await far.post()
        assert counts(far) == (1, 1, 0)
        passage = Passage(answer, None)
        if way == "chunks":
            await answer.next_chunk()
        else:
            await passage.pass_on(lambda _: False)
        assert counts(far) == (1, 0, 0)
        asked = far.pulse.asked_at
        more = answer.next_chunk() if way == "chunks" else passage.pass_on(lambda _: False)
        waiting = asyncio.ensure_future(more)
        await until(lambda: far.pulse.listening)
        assert counts(far) == (1, 0, 1)
        assert far.pulse.asked_at > asked
        waiting.cancel()
        await asyncio.wait({waiting})
        assert counts(far) == (1, 0, 0)
        answer.close()
        assert counts(far) == (0, 0, 0)


async def test_who_waits_for_the_head_of_an_answer_listens() -> None:
    async with wire(silent) as far:
        asking = asyncio.create_task(far.post())
        await until(lambda: far.pulse.listening)
        assert counts(far) == (0, 1, 1)
        assert not works_for_nobody(far)
        asking.cancel()
        await asyncio.wait({asking})
        assert counts(far) == (0, 0, 0)


async def test_a_request_that_is_cancelled_leaves_work_behind() -> None:
    async with wire(silent) as far:
        asking = asyncio.create_task(far.post())
        await until(lambda: far.pulse.listening)
        asking.cancel()
        await asyncio.wait({asking})
        assert works_for_nobody(far)


@pytest.mark.parametrize("read", [0, 1])
async def test_an_answer_that_is_closed_before_its_end_leaves_work_behind(read: int) -> None:
    async with wire(one_line) as far:
        answer = await far.post()
        for _ in range(read):
            await answer.next_chunk()
        assert not works_for_nobody(far)
        answer.close()
        assert works_for_nobody(far)
        far.pulse.beat()
        answer.close()
        assert not works_for_nobody(far)


async def test_for_as_long_as_the_next_chunk_might_have_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    async with wire(one_line) as far:
        monkeypatch.setattr(far.pulse, "leave", left.append)
        for chunks in range(2):
            answer = await far.post(limits=Limits(first_chunk=600, silence=60))
            for _ in range(chunks):
                await answer.next_chunk()
            answer.close()
    assert left == [600, 60]


@pytest.mark.parametrize("way", ["chunks", "bytes"])
async def test_one_that_was_read_to_its_end_does_not(way: str) -> None:
    async with wire(saying(UNTIL_CLOSED + LINE + DONE)) as far:
        answer = await far.post()
        if way == "chunks":
            await read_all(answer)
        else:
            await Passage(answer, None).pass_on(lambda _: True)
        answer.close()
        assert not works_for_nobody(far)
        assert counts(far) == (0, 0, 0)


@pytest.mark.parametrize(
    ("said", "kind"),
    [(LINE, BadAnswer), (LINE + b'{"error":"boom"}\n', MlxsupError)],
    ids=["broken off", "failed"],
)
async def test_nor_one_that_the_runner_ended(said: bytes, kind: type[MlxsupError]) -> None:
    async with wire(saying(UNTIL_CLOSED + said)) as far:
        answer = await far.post()
        with pytest.raises(kind):
            await read_all(answer)
        answer.close()
        assert not works_for_nobody(far)
        assert counts(far) == (0, 0, 0)


@pytest.mark.parametrize("stage", ["head", "first", "more"])
async def test_nor_one_that_has_had_its_time(stage: str) -> None:
    """A runner that is silent for that long is not given as much again."""
    limits = Limits(first_chunk=WIDE.first_chunk if stage == "more" else 0.1, silence=0.1)
    async with wire({"head": silent, "first": no_line, "more": one_line}[stage]) as far:

        async def work() -> None:
            answer = await far.post(limits=limits)
            try:
                await read_all(answer)
            finally:
                answer.close()

        with pytest.raises(Stalled):
            await work()
        assert not works_for_nobody(far)
        assert counts(far) == (0, 0, 0)
