"""An answer that is only passed on: the runner's own bytes, however they were cut, and the same judgement of how it ended."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsup.errors import BadAnswer, MlxsupError, RunnerError
from mlxsup.protocol import CompletionChunk
from mlxsup.runners.passage import LONG_LINE, MAX_SKELETON, Passage, Skeleton

from .chunking import cut
from .wire_server import LAST_WORDS, UNTIL_CLOSED, Exchange, Wire, saying, wire

LINE = b'{"content":"a "}\n'
DONE = b'{"content":"b","done":true,"seed":7}\n'
STEP = b'{"step":1,"total":2}\n'
PREVIEW = b'{"image":"%b","preview":true,"step":1,"total":2}\n'

ESCAPED = st.lists(st.sampled_from(['"', "\\", "/", "\n", "a", "é", "\x1f", "😀"]), max_size=90).map("".join)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.text(max_size=90), ESCAPED),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
    max_leaves=12,
)


async def next_bytes(passage: Passage) -> bytes:
    """What a call to pass on brings when one block is enough, b"" at the end."""
    found: list[bytes] = []
    more = await passage.pass_on(found.append)
    assert found or not more
    return b"".join(found)


async def passed(far: Wire, seed: int | None = None) -> bytes:
    passage = Passage(await far.post(), seed)
    found = bytearray()
    while block := await next_bytes(passage):
        found += block
    assert passage.ended
    assert await next_bytes(passage) == b""
    return bytes(found)


async def broken(far: Wire) -> tuple[bytes, MlxsupError]:
    """What came through before the failure, and the failure."""
    passage = Passage(await far.post(), None)
    found = bytearray()
    with pytest.raises(MlxsupError) as caught:
        while block := await next_bytes(passage):
            found += block
    assert caught.value.details["last_words"] == LAST_WORDS
    with pytest.raises(MlxsupError):
        await next_bytes(passage)
    return bytes(found), caught.value


class TestWhole:
    @pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
    async def test_the_bytes_come_through_as_they_are(self, size: int) -> None:
        picture = b'{"image":"%b","done":true,"seed":7}\n' % (b"QUJD" * 40_000)
        body = STEP + STEP + picture
        pieces = (UNTIL_CLOSED, *(body[at : at + size] for at in range(0, min(len(body), 3000 * size), size)))
        rest = body[3000 * size :]
        async with wire(saying(*pieces, rest)) as far:
            assert await passed(far) == body

    @pytest.mark.parametrize("size", [8, 2 * LONG_LINE], ids=["short", "long"])
    async def test_previews_come_through(self, size: int) -> None:
        preview = PREVIEW % (b"A" * size)
        body = STEP + preview + preview + b'{"image":"%b","done":true,"seed":7}\n' % (b"A" * size)
        async with wire(saying(UNTIL_CLOSED + body)) as far:
            assert await passed(far) == body

    async def test_a_seed_that_the_runner_does_not_report_is_added(self) -> None:
        told = UNTIL_CLOSED + LINE + b'{"content":"b","done":true}\n'
        async with wire(saying(told)) as far:
            last = (await passed(far, seed=11)).splitlines()[-1]
        assert msgspec.json.decode(last, type=CompletionChunk) == CompletionChunk(content="b", done=True, seed=11)

    @pytest.mark.parametrize("tail", [b"", b"\r", b" "])
    @pytest.mark.parametrize("size", [0, 1, 2, 9, 30])
    async def test_a_seed_is_added_to_a_picture_too(self, size: int, tail: bytes) -> None:
        """Though nearly all of it has passed by then; `size` is that of the pieces in which its end comes, 0 for one."""
        picture = b"QUJD}" * LONG_LINE
        line = b'{"image":"%b","done":true}%b\n' % (picture, tail)
        near = len(line) - 60
        pieces = [line[:near], *(line[at : at + size] for at in range(near, len(line), size))] if size else [line]
        async with wire(saying(UNTIL_CLOSED)) as far:
            passage = Passage(await far.post(), 11)
            found = b"".join(passage._judge(piece) for piece in (STEP, *pieces))
        assert passage.ended
        assert found == STEP + b'{"image":"%b","done":true,"seed":11}\n' % picture

    @pytest.mark.parametrize("end", [b',"seed":7}', b"}" + 100 * b" "], ids=["seed", "white space"])
    async def test_a_picture_with_a_seed_and_one_with_too_much_behind_it_stay_as_they_are(self, end: bytes) -> None:
        body = STEP + b'{"image":"%b","done":true%b\n' % (b"QUJD" * LONG_LINE, end)
        async with wire(saying(UNTIL_CLOSED)) as far:
            passage = Passage(await far.post(), 11)
            found = b"".join(passage._judge(body[at : at + 50]) for at in range(0, len(body), 50))
        assert passage.ended
        assert found == body

    async def test_a_seed_that_it_does_report_stays(self) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE + DONE)) as far:
            assert await passed(far, seed=11) == LINE + DONE

    async def test_a_picture_whose_slashes_are_escaped_is_a_picture(self) -> None:
        """As the JSON encoders of Swift and PHP do; base64 of a JPEG begins with a slash."""
        body = STEP + b'{"image":"\\/9j\\/%b","done":true}\n' % (b"A" * 2 * LONG_LINE)
        async with wire(saying(UNTIL_CLOSED + body)) as far:
            assert await passed(far) == body

    async def test_a_last_line_without_newline(self) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE + DONE.rstrip())) as far:
            assert (await passed(far)).rstrip() == (LINE + DONE).rstrip()

    async def test_a_long_last_line_without_newline(self) -> None:
        body = STEP + b'{"image":"%b","done":true}' % (b"A" * 2 * LONG_LINE)
        async with wire(saying(UNTIL_CLOSED + body)) as far:
            assert (await passed(far)).rstrip() == body

    async def test_lines_that_come_together_go_on_together(self) -> None:
        body = 50 * LINE + DONE
        async with wire(saying(UNTIL_CLOSED + body)) as far:
            passage = Passage(await far.post(), None)
            assert await next_bytes(passage) == body

    @pytest.mark.parametrize("size", [1, 3, 20, 1000])
    async def test_blank_lines_are_left_out(self, size: int) -> None:
        body = b"\n" + LINE + b" \n\r\n" + LINE + LINE + b"\n" + DONE
        async with wire(saying(UNTIL_CLOSED)) as far:
            passage = Passage(await far.post(), None)
            found = [passage._judge(body[at : at + size]) for at in range(0, len(body), size)]
        assert b"".join(found) == 3 * LINE + DONE
        assert passage.ended

    async def test_a_seed_is_added_behind_other_lines_of_the_same_block(self) -> None:
        told = 5 * LINE + b'{"content":"b","done":true}\r\n'
        async with wire(saying(UNTIL_CLOSED + told)) as far:
            assert await passed(far, seed=11) == 5 * LINE + b'{"content":"b","done":true,"seed":11}\n'

    async def test_pictures_among_many_short_lines_count(self) -> None:
        body = STEP + 20 * LINE + b'{"image":"aGk=","step":2,"total":2}\n' + 20 * LINE
        async with wire(saying(UNTIL_CLOSED + body, DONE)) as far:
            assert await passed(far) == body + DONE

    async def test_what_comes_behind_the_last_chunk_is_left_out(self) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE + DONE + b"and so on\n")) as far:
            assert await passed(far) == LINE + DONE

    async def test_each_line_comes_as_soon_as_it_is_sent(self) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED + LINE)
            await read.wait()
            await exchange.send(DONE)

        read = asyncio.Event()
        async with wire(answer) as far:
            passage = Passage(await far.post(), None)
            assert await next_bytes(passage) == LINE
            read.set()
            assert await next_bytes(passage) == DONE

    @pytest.mark.may_block("of no concern here")
    async def test_a_picture_of_64_mib_costs_a_few_blocks(self) -> None:
        size, block = 64 << 20, b"A" * (1 << 20)

        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED + STEP + b'{"image":"')
            for _ in range(size // len(block)):
                await exchange.send(block)
            await exchange.send(b'","done":true}\n')

        async with wire(answer) as far:
            passage = Passage(await far.post(), None)
            length = 0
            tracemalloc.start()
            try:
                while data := await next_bytes(passage):
                    length += len(data)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert length > size
        assert peak < 8 << 20  # the server's own blocks are in it

    @pytest.mark.parametrize("size", range(1, 40))
    async def test_lines_may_come_in_any_pieces(self, size: int) -> None:
        body = STEP + LINE + LINE + b'{"image":"%b"}\n' % (b"A" * 200) + LINE + DONE
        async with wire(saying(UNTIL_CLOSED)) as far:
            passage = Passage(await far.post(), None)
            found = [passage._judge(body[at : at + size]) for at in range(0, len(body), size)]
        assert b"".join(found) == body
        assert passage.ended


class TestBroken:
    @pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
    async def test_an_answer_cut_at_any_byte_is_never_whole(self, long: bool) -> None:
        filler = b"A" * (LONG_LINE + 10) if long else b"A"
        last = b'{"image":"%b","done":true}' % filler
        body = STEP + last
        places = [*range(len(STEP) + 15), *range(len(body) - 20, len(body))] if long else range(len(body))
        at = 0

        async def answer(exchange: Exchange) -> None:
            await exchange.send(UNTIL_CLOSED + body[:at])

        async with wire(answer) as far:
            for at in places:
                found, error = await broken(far)
                assert isinstance(error, BadAnswer), f"cut after {at} bytes"
                assert body.startswith(found)

    async def test_a_bad_line_is_not_passed_on_and_what_was_before_it_is(self) -> None:
        async with wire(saying(UNTIL_CLOSED + LINE + LINE + b"no JSON\n" + DONE)) as far:
            found, error = await broken(far)
        assert found == LINE + LINE
        assert isinstance(error, BadAnswer)

    async def test_a_bad_line_among_many(self) -> None:
        async with wire(saying(UNTIL_CLOSED + 50 * LINE + b"no JSON\n" + 50 * LINE + DONE)) as far:
            found, error = await broken(far)
        assert found == 50 * LINE
        assert isinstance(error, BadAnswer)

    async def test_a_preview_promises_a_picture(self) -> None:
        promise = LINE + b'{"preview":true}\n' + LINE
        async with wire(saying(UNTIL_CLOSED)) as far:
            passage = Passage(await far.post(), None)
            assert passage._judge(promise) == promise
            assert passage._judge(DONE) == b""
            with pytest.raises(BadAnswer, match="without a picture"):
                await next_bytes(passage)

    async def test_previews_among_many_short_lines_do_not_count(self) -> None:
        body = 20 * LINE + PREVIEW % b"aGk=" + 20 * LINE
        async with wire(saying(UNTIL_CLOSED + body, b'{"done":true}\n')) as far:
            found, error = await broken(far)
        assert "without a picture" in error.message
        assert found == body

    @pytest.mark.parametrize("size", [1, LONG_LINE])
    async def test_an_error_in_the_stream(self, size: int) -> None:
        told = json.dumps({"content": "error: " + "x" * size, "done": True}).encode() + b"\n"
        async with wire(saying(UNTIL_CLOSED + STEP + told)) as far:
            _, error = await broken(far)
        assert isinstance(error, RunnerError)

    @pytest.mark.parametrize("end", [b',"done":true}\n', b"}\n", b"}"], ids=["done", "", "bare"])
    @pytest.mark.parametrize("size", [1, LONG_LINE])
    async def test_an_error_that_is_a_field_of_its_own(self, size: int, end: bytes) -> None:
        told = b'{"error":"boom %b"%b' % (b"x" * size, end)
        async with wire(saying(UNTIL_CLOSED + 50 * LINE + told)) as far:
            found, error = await broken(far)
        assert isinstance(error, RunnerError)
        assert error.message.startswith("boom x")
        assert found == 50 * LINE or size == LONG_LINE

    async def test_done_without_the_picture(self) -> None:
        async with wire(saying(UNTIL_CLOSED + STEP + b'{"done":true}\n')) as far:
            _, error = await broken(far)
        assert "without a picture" in error.message

    @pytest.mark.parametrize("size", [8, 2 * LONG_LINE], ids=["short", "long"])
    async def test_done_with_no_more_than_previews(self, size: int) -> None:
        async with wire(saying(UNTIL_CLOSED + PREVIEW % (b"A" * size) + b'{"done":true}\n')) as far:
            found, error = await broken(far)
        assert "without a picture" in error.message
        assert found == PREVIEW % (b"A" * size)

    async def test_a_long_line_that_is_no_chunk(self) -> None:
        told = b'{"image":"%b","done":maybe}\n' % (b"A" * 2 * LONG_LINE)
        async with wire(saying(UNTIL_CLOSED + STEP + told)) as far:
            _, error = await broken(far)
        assert isinstance(error, BadAnswer)

    async def test_a_line_of_numbers_without_end(self) -> None:
        told = b'{"x":[' + b"1," * MAX_SKELETON
        async with wire(saying(UNTIL_CLOSED + told)) as far:
            _, error = await broken(far)
        assert isinstance(error, BadAnswer)


class TestSkeleton:
    @given(JSON, st.booleans(), st.data())
    def test_it_is_json_of_the_same_shape(self, value: object, ascii_only: bool, data: st.DataObject) -> None:
        line = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace")
        skeleton = Skeleton()
        for piece in cut(line, data):
            skeleton.feed(piece)
        assert _shape(json.loads(skeleton.json)) == _shape(value)

    @given(JSON)
    def test_short_strings_without_escapes_are_whole(self, value: object) -> None:
        line = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        if b"\\" in line or any(len(text.encode()) > 60 for text in _strings(value)):
            return
        skeleton = Skeleton()
        skeleton.feed(line)
        assert json.loads(skeleton.json) == value

    @pytest.mark.parametrize("filler", [b"\\n", b'\\"', b"\\\\", b"a", b'","'])
    def test_its_cost_grows_with_the_line_only(self, filler: bytes) -> None:
        def cost(count: int) -> float:
            line = b'["' + filler * count + b'"]'
            began = time.process_time()
            with suppress(BadAnswer):
                Skeleton().feed(line)
            return time.process_time() - began

        assert cost(400_000) < 45 * max(min(cost(20_000) for _ in range(3)), 0.001)  # a line 20 times as long

    def test_it_stays_small(self) -> None:
        skeleton = Skeleton()
        skeleton.feed(b'{"image":"')
        for _ in range(100):
            skeleton.feed(b"A" * 100_000 + b"\\n")
        skeleton.feed(b'"}')
        assert len(skeleton.json) < 200
        assert json.loads(skeleton.json)["image"]


def _shape(value: object) -> object:
    """What stays of a value when the insides of its strings may be lost: keys may then fall together."""
    if isinstance(value, str):
        return "text" if value else ""
    if isinstance(value, list):
        return [_shape(each) for each in value]
    if isinstance(value, dict):
        return "mapping"
    return value


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for each in value for text in _strings(each)]
    if isinstance(value, dict):
        return [text for key, each in value.items() for text in (key, *_strings(each))]
    return []
