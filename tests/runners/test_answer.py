"""An answer ends in exactly one of two ways: a last chunk with its result, or an error that says what is wrong."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from mlxsup.errors import BadAnswer, MlxsupError, QueueFull, RunnerError, Stalled
from mlxsup.protocol import CompletionChunk, CompletionRequest, Options
from mlxsup.runners.relay import Answer, Limits

from .wire_server import CHUNKED, LAST_WORDS, OPENING, UNTIL_CLOSED, WIDE, Exchange, read_all, saying, wire

LINE = b'{"content":"a "}\n'
DONE = b'{"content":"b","done":true,"stop_reason":"stop"}\n'
STEP = b'{"step":1,"total":2}\n'
PICTURE = b'{"image":"aGk=","done":true}\n'
PREVIEW = b'{"image":"cHJl","preview":true,"step":1,"total":2}\n'


def chunked(*bodies: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + end


async def failure(answer: Answer) -> MlxsupError:
    """What reading the whole answer ends with; every such error carries the runner's last words."""
    with pytest.raises(MlxsupError) as caught:
        await read_all(answer)
    assert caught.value.details["last_words"] == LAST_WORDS
    return caught.value


class TestWhole:
    @pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
    async def test_chunks_come_out_as_they_went_in(self, unix: bool) -> None:
        async with wire(saying(chunked(LINE, LINE, DONE)), unix=unix) as far:
            chunks = await read_all(await far.post())
        assert [chunk.content for chunk in chunks] == ["a ", "a ", "b"]
        assert chunks[-1].stop_reason == "stop"

    @pytest.mark.parametrize(
        "told",
        [
            chunked(LINE + LINE + DONE),
            chunked(LINE[:5], LINE[5:] + LINE[:1], LINE[1:] + DONE[:9], DONE[9:]),
            UNTIL_CLOSED + LINE + LINE + DONE,
            b"HTTP/1.0 200 OK\r\n\r\n" + LINE + LINE + DONE,
            OPENING + b"Content-Length: %d\r\n\r\n" % (2 * len(LINE) + len(DONE)) + LINE + LINE + DONE,
            UNTIL_CLOSED + LINE + b"\r\n\n" + LINE.replace(b"\n", b"\r\n") + b"  \n" + DONE,
            UNTIL_CLOSED + LINE + LINE + DONE.rstrip(),
            UNTIL_CLOSED + LINE + LINE + DONE + b"\nwhat comes after the last chunk is nobody's concern",
            UNTIL_CLOSED + LINE.replace(b"{", b'{"unknown":[1,{"x":null}],') + LINE + DONE,
        ],
        ids=[
            "one piece",
            "odd pieces",
            "until closed",
            "HTTP/1.0",
            "content length",
            "blank lines",
            "no last newline",
            "trailing",
            "unknown field",
        ],
    )
    async def test_every_way_of_writing_it_is_fine(self, told: bytes) -> None:
        async with wire(saying(told)) as far:
            chunks = await read_all(await far.post())
        assert [chunk.content for chunk in chunks] == ["a ", "a ", "b"]
        assert far.blamed == []

    async def test_byte_by_byte(self) -> None:
        body = chunked(LINE, DONE)
        async with wire(saying(*(body[at : at + 1] for at in range(len(body))))) as far:
            assert len(await read_all(await far.post())) == 2

    async def test_a_picture(self) -> None:
        async with wire(saying(chunked(STEP, PICTURE))) as far:
            step, picture = await read_all(await far.post())
        assert (step.step, step.total) == (1, 2)
        assert picture.image_bytes() == b"hi"

    async def test_previews_come_before_the_picture(self) -> None:
        async with wire(saying(chunked(STEP, PREVIEW, PREVIEW, PICTURE))) as far:
            chunks = await read_all(await far.post())
        assert [(chunk.preview, chunk.done) for chunk in chunks] == [
            (False, False),
            *2 * [(True, False)],
            (False, True),
        ]
        assert [chunk.image_bytes() for chunk in chunks[1:]] == [b"pre", b"pre", b"hi"]

    async def test_a_chunk_comes_as_soon_as_it_is_sent(self) -> None:
        read = asyncio.Event()

        async def answer(exchange: Exchange) -> None:
            await exchange.send(CHUNKED)
            await exchange.chunk(LINE)
            await read.wait()
            await exchange.chunk(DONE)
            await exchange.chunk(b"")

        async with wire(answer) as far:
            found = await far.post()
            assert (await found.next_chunk()).content == "a "
            read.set()
            assert (await found.next_chunk()).done

    async def test_the_request_is_sent_as_the_wire_has_it(self) -> None:
        seen: list[Exchange] = []

        async def answer(exchange: Exchange) -> None:
            seen.append(exchange)
            await exchange.send(chunked(DONE))

        request = CompletionRequest(prompt="é", seed=7, images=[b"\0\xff"], options=Options(top_k=3))
        async with wire(answer) as far:
            await read_all(await far.post(request))
        (exchange,) = seen
        assert exchange.head.startswith(b"POST /completion HTTP/1.1\r\n")
        assert b"content-type: application/json" in exchange.head.lower()
        assert msgspec.json.decode(exchange.body, type=CompletionRequest) == request
        assert msgspec.json.decode(exchange.body)["images"] == ["AP8="]

    @pytest.mark.parametrize("size", [200_000, 3 << 20], ids=["in one", "in pieces"])
    async def test_a_large_request_arrives_whole_and_says_how_long_it_is(self, size: int) -> None:
        seen: list[Exchange] = []

        async def answer(exchange: Exchange) -> None:
            seen.append(exchange)
            await exchange.send(chunked(DONE))

        request = CompletionRequest(prompt="p", seed=7, images=[bytes(range(256)) * (size // 256)])
        async with wire(answer) as far:
            await read_all(await far.post(request))
        (exchange,) = seen
        assert b"content-length: %d\r\n" % len(msgspec.json.encode(request)) in exchange.head.lower()
        assert b"transfer-encoding" not in exchange.head.lower()
        assert exchange.head.lower().count(b"content-type: application/json\r\n") == 1
        assert msgspec.json.decode(exchange.body, type=CompletionRequest) == request

    async def test_cookies_of_one_answer_do_not_go_with_the_next_request(self) -> None:
        heads: list[bytes] = []

        async def answer(exchange: Exchange) -> None:
            heads.append(exchange.head.lower())
            await exchange.send(chunked(DONE).replace(b"\r\n", b"\r\nSet-Cookie: caller=one; Path=/\r\n", 1))

        async with wire(answer) as far:
            for _ in range(2):
                await read_all(await far.post())
        assert [b"cookie" in head for head in heads] == [False, False]

    async def test_a_line_of_20_mib(self) -> None:
        size = 20 << 20
        body = b'{"image":"%b","done":true}\n' % (b"A" * size)
        async with wire(saying(UNTIL_CLOSED, STEP, body)) as far:
            chunks = await read_all(await far.post())
        assert len(chunks[-1].image) == size

    async def test_a_text_that_begins_like_an_error_is_a_text(self) -> None:
        told = UNTIL_CLOSED + LINE + b'{"content":"error: is the word","done":true,"eval_count":3}\n'
        async with wire(saying(told)) as far:
            assert (await read_all(await far.post()))[-1].content == "error: is the word"


class TestBroken:
    @pytest.mark.parametrize("opening", [UNTIL_CLOSED, b"HTTP/1.0 200 OK\r\n\r\n"], ids=["HTTP/1.1", "HTTP/1.0"])
    async def test_an_answer_cut_at_any_byte_is_never_whole(self, opening: bytes) -> None:
        body = LINE + DONE.rstrip()
        at = 0

        async def answer(exchange: Exchange) -> None:
            await exchange.send(opening + body[:at])

        async with wire(answer) as far:
            for at in range(len(body)):
                error = await failure(await far.post())
                assert isinstance(error, BadAnswer), f"cut after {at} bytes"
        assert len(far.blamed) == len(body)

    async def test_a_chunked_answer_cut_at_any_byte_before_its_last_chunk_is_whole(self) -> None:
        body = chunked(LINE, DONE)
        needed = body.index(DONE) + len(DONE) - 1  # the newline after the last line may be lost
        at = 0

        async def answer(exchange: Exchange) -> None:
            await exchange.send(body[:at])

        async with wire(answer) as far:
            for at in range(len(CHUNKED), needed - 1):
                assert isinstance(await failure(await far.post()), BadAnswer), f"cut after {at} bytes"

    async def test_a_shorter_body_than_promised(self) -> None:
        async with wire(saying(OPENING + b"Content-Length: 1000\r\n\r\n" + LINE)) as far:
            assert isinstance(await failure(await far.post()), BadAnswer)
        assert "broke off" in far.blamed[0] or "ended without" in far.blamed[0]

    async def test_a_reset(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(CHUNKED)
            await exchange.chunk(LINE)
            await got_it.wait()
            exchange.reset()

        got_it = asyncio.Event()
        async with wire(answer, unix=False) as far:
            found = await far.post()
            assert (await found.next_chunk()).content == "a "
            got_it.set()
            assert isinstance(await failure(found), BadAnswer)
        assert len(far.blamed) == 1

    async def test_an_end_without_a_last_chunk(self) -> None:
        async with wire(saying(chunked(LINE, LINE))) as far:
            error = await failure(await far.post())
        assert "ended without a last chunk" in error.message
        assert far.blamed == ["its answer ended without a last chunk"]

    async def test_half_a_line(self) -> None:
        async with wire(saying(chunked(LINE, LINE[:8]))) as far:
            error = await failure(await far.post())
        assert "in the middle of a line" in error.message

    async def test_a_last_line_without_done_is_half_an_answer(self) -> None:
        async with wire(saying(chunked(LINE, LINE.rstrip()))) as far:
            assert isinstance(await failure(await far.post()), BadAnswer)

    async def test_no_byte_of_an_answer(self) -> None:
        async with wire(saying(chunked())) as far:
            assert "ended without a last chunk" in (await failure(await far.post())).message

    @pytest.mark.parametrize(
        "line",
        [
            b"not JSON",
            b"[1,2]",
            b'"text"',
            b"null",
            b'{"content":1}',
            b'{"step":"one"}',
            b'{"done":"yes"}',
            b'{"content":"\xff"}',
            b"\0",
            b'{"content":"a"}{"content":"b"}',
            b'{"x":' * 20_000,
            b"data: {}",
        ],
        ids=lambda line: line[:12].decode("latin-1"),
    )
    async def test_a_line_that_is_no_chunk(self, line: bytes) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE + line + b"\n" + DONE)) as far:
            found = await far.post()
            assert (await found.next_chunk()).content == "a "
            error = await failure(found)
        assert isinstance(error, BadAnswer)
        assert len(error.message) < 500

    async def test_done_without_the_picture(self) -> None:
        async with wire(saying(chunked(STEP, b'{"done":true}\n'))) as far:
            assert "without a picture" in (await failure(await far.post())).message

    @pytest.mark.parametrize("preview", [PREVIEW, b'{"image":"cHJl","preview":true}\n'], ids=["with steps", "without"])
    @pytest.mark.parametrize("last", [b'{"done":true}\n', b'{"image":"cHJl","preview":true,"done":true}\n'])
    async def test_done_with_no_more_than_previews(self, preview: bytes, last: bytes) -> None:
        async with wire(saying(chunked(preview, preview, last))) as far:
            assert "without a picture" in (await failure(await far.post())).message

    async def test_an_end_behind_a_preview(self) -> None:
        async with wire(saying(chunked(STEP, PREVIEW))) as far:
            assert "ended without a last chunk" in (await failure(await far.post())).message

    async def test_a_picture_before_the_last_chunk_counts(self) -> None:
        async with wire(saying(chunked(STEP, b'{"image":"aGk="}\n', b'{"done":true}\n'))) as far:
            assert (await read_all(await far.post()))[-1].done

    @pytest.mark.parametrize("before", [[STEP], [], [STEP, b'{"image":"aGk="}\n']], ids=["steps", "first", "picture"])
    async def test_an_error_in_the_stream(self, before: list[bytes]) -> None:
        told = b'{"content":"error:  no memory for 9 x 9 ","done":true}\n'
        async with wire(saying(chunked(*before, told))) as far:
            error = await failure(await far.post())
        assert isinstance(error, RunnerError)
        assert (error.message, error.status, error.source) == ("no memory for 9 x 9", 500, "runner")

    @pytest.mark.parametrize(
        "before", [[], [LINE], 50 * [LINE], [STEP, PREVIEW]], ids=["first", "text", "many", "steps"]
    )
    @pytest.mark.parametrize(
        "end", [b',"done":true}\n', b"}\n", b',"done":true}', b"}"], ids=["done", "", "cut", "bare"]
    )
    async def test_an_error_that_is_a_field_of_its_own(self, before: list[bytes], end: bytes) -> None:
        told = b'{"error":{"message":"no memory","code":"queue_full"}' + end
        async with wire(saying(UNTIL_CLOSED + b"".join(before) + told)) as far:
            error = await failure(await far.post())
        assert (type(error), error.message, error.status) == (QueueFull, "no memory", 503)
        assert far.blamed == []

    async def test_an_error_that_is_a_text(self) -> None:
        async with wire(saying(chunked(LINE, b'{"error":"boom","content":null,"done":true}\n'))) as far:
            error = await failure(await far.post())
        assert (type(error), error.message, error.status) == (RunnerError, "boom", 500)


class TestLimits:
    async def test_no_first_chunk(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(CHUNKED)
            await exchange.client_left()
            left.set()

        left = asyncio.Event()
        async with wire(answer) as far:
            error = await failure(await far.post(limits=Limits(first_chunk=0.1, silence=15)))
            await left.wait()
        assert isinstance(error, Stalled)
        assert error.message == "the runner sent no first chunk for 0.1 s"

    async def test_no_head_of_an_answer(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.client_left()
            left.set()

        left = asyncio.Event()
        async with wire(answer) as far:
            with pytest.raises(Stalled, match=r"did not answer within 0\.1 s"):
                await far.post(limits=Limits(first_chunk=0.1, silence=15))
            await left.wait()

    async def test_the_head_and_the_first_chunk_share_one_limit(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await asyncio.sleep(1.5)  # a slow head, which leaves 0.5 s for the first chunk
            await exchange.send(CHUNKED)
            await exchange.client_left()

        async with wire(answer) as far:
            began = time.monotonic()
            error = await failure(await far.post(limits=Limits(first_chunk=2, silence=15)))
            assert 2 <= time.monotonic() - began < 3.4
        assert error.message == "the runner sent no first chunk for 2 s"

    async def test_silence_between_chunks(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(CHUNKED)
            await exchange.chunk(LINE)
            await exchange.client_left()
            left.set()

        left = asyncio.Event()
        async with wire(answer) as far:
            found = await far.post(limits=Limits(first_chunk=15, silence=0.1))
            await found.next_chunk()
            error = await failure(found)
            await left.wait()
        assert isinstance(error, Stalled)
        assert error.message == "the runner sent nothing more for 0.1 s"

    async def test_blank_lines_are_no_first_chunk(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED)
            while True:
                await exchange.send(b"\n")
                await asyncio.sleep(0.02)

        async with wire(answer) as far:
            found = await far.post(limits=Limits(first_chunk=0.2, silence=15))
            async with asyncio.timeout(5):
                assert isinstance(await failure(found), Stalled)

    async def test_the_time_of_a_slow_reader_does_not_count(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(chunked(LINE, DONE))

        async with wire(answer) as far:
            found = await far.post(limits=Limits(first_chunk=15, silence=0.1))
            await found.next_chunk()
            await asyncio.sleep(0.2)  # slow on purpose: this is what is tested
            assert (await found.next_chunk()).done


class TestLeaving:
    async def test_close_lets_the_runner_see_its_caller_leave(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(CHUNKED)
            await exchange.chunk(LINE)
            await exchange.client_left()
            left.set()

        left = asyncio.Event()
        async with wire(answer) as far:
            found = await far.post()
            await found.next_chunk()
            found.close()
            found.close()
            async with asyncio.timeout(5):
                await left.wait()

    async def test_a_cancelled_request_leaves_too(self) -> None:
        async def answer(exchange: Exchange) -> None:
            arrived.set()
            await exchange.client_left()
            left.set()

        arrived, left = asyncio.Event(), asyncio.Event()
        async with wire(answer) as far:
            asking = asyncio.create_task(far.post())
            await arrived.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            async with asyncio.timeout(5):
                await left.wait()

    async def test_the_last_chunk_ends_the_connection(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(CHUNKED)
            await exchange.chunk(DONE)
            await exchange.client_left()
            left.set()

        left = asyncio.Event()
        async with wire(answer) as far:
            assert await read_all(await far.post()) == [CompletionChunk(content="b", done=True, stop_reason="stop")]
            async with asyncio.timeout(5):
                await left.wait()

    async def test_many_answers_at_once_do_not_mix(self) -> None:
        async def answer(exchange: Exchange) -> None:
            prompt = msgspec.json.decode(exchange.body)["prompt"]
            await exchange.send(CHUNKED)
            for number in range(20):
                await exchange.chunk(b'{"content":"%b.%d "}\n' % (prompt.encode(), number))
                await asyncio.sleep(0)
            await exchange.chunk(DONE)

        async with wire(answer) as far:

            async def ask(name: str) -> str:
                chunks = await read_all(await far.post(CompletionRequest(prompt=name), WIDE))
                return "".join(chunk.content for chunk in chunks)

            found = await asyncio.gather(*(ask(f"p{number}") for number in range(50)))
        assert found == ["".join(f"p{number}.{at} " for at in range(20)) + "b" for number in range(50)]
