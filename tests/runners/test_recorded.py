"""What the image runner really answers, cut at every place where a network might cut it: always the same answer.

`python -m tests.runners.recording` writes the answers anew.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
import random
import re
import socket
from typing import Any, cast

import msgspec
import pytest
from aiohttp.client_proto import ResponseHandler

from mlxsup.errors import MlxsupError
from mlxsup.protocol import CompletionChunk
from mlxsup.runners.passage import LONG_LINE, Passage

from .recording import FOLDER
from .wire_server import Exchange, Wire, read_all, wire

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ANSWERS = ["picture", "previews"]
NEAR, FAR = 24, 8
"""Within so many bytes of anything but base64 each place counts; elsewhere one in so many does."""
_BASE64 = re.compile(rb"[A-Za-z0-9+/=]*")


def recorded(name: str) -> bytes:
    return (FOLDER / f"{name}.http").read_bytes()


def body(said: bytes) -> bytes:
    """What the standard library reads of it."""

    class Heard:
        def makefile(self, *_: Any) -> io.BytesIO:
            return io.BytesIO(said)

    response = http.client.HTTPResponse(cast("socket.socket", Heard()))
    response.begin()
    return response.read()


def places(said: bytes) -> list[int]:
    """Where to cut in two."""
    return [
        at for at in range(1, len(said)) if at % FAR == 0 or not _BASE64.fullmatch(said[max(0, at - NEAR) : at + NEAR])
    ]


async def passed(far: Wire) -> bytes:
    found = bytearray()
    passage = Passage(await far.post(), None)
    while await passage.pass_on(found.extend):
        pass
    return bytes(found)


class Cutter:
    """Answers with the pieces that it is given; each is read before the next is sent."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    async def __call__(self, exchange: Exchange) -> None:
        for piece in self.pieces:
            await exchange.send(piece)
            for _ in range(3):
                await asyncio.sleep(0)


@pytest.mark.parametrize("way", ["chunks", "bytes"])
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_cut_in_two_anywhere_is_the_same(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = recorded(name)
    reads = 0
    data_received = ResponseHandler.data_received

    def counted(handler: ResponseHandler, data: bytes) -> None:
        nonlocal reads
        reads += 1
        data_received(handler, data)

    monkeypatch.setattr(ResponseHandler, "data_received", counted)
    whole = body(said)
    chunks = msgspec.json.Decoder(CompletionChunk).decode_lines(whole)
    cutter = Cutter()
    async with wire(cutter) as far:
        for at in places(said):
            cutter.pieces = (said[:at], said[at:])
            if way == "bytes":
                assert await passed(far) == whole, f"cut at {at}"
            else:
                assert await read_all(await far.post()) == chunks, f"cut at {at}"
    assert reads >= 1.9 * len(places(said))  # the pieces did come one by one


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_cut_into_many_pieces_is_the_same(name: str) -> None:
    said, chance = recorded(name), random.Random(name)
    whole = body(said)
    cutter = Cutter()
    async with wire(cutter) as far:
        for _ in range(50):
            cuts = [0, *sorted(chance.choices(range(len(said)), k=chance.randint(2, 40))), len(said)]
            cutter.pieces = tuple(said[start:end] for start, end in itertools.pairwise(cuts))
            assert await passed(far) == whole, f"cut at {cuts}"


async def test_a_refusal_cut_anywhere_is_the_same() -> None:
    said = recorded("refusal")
    told = msgspec.json.decode(body(said))["error"]
    cutter = Cutter()
    async with wire(cutter) as far:
        for at in range(1, len(said)):
            cutter.pieces = (said[:at], said[at:])
            with pytest.raises(MlxsupError) as caught:
                await far.post()
            assert (caught.value.message, caught.value.code) == (told["message"], told["code"]), f"cut at {at}"
            assert caught.value.status == 400


async def test_cut_off_anywhere_it_is_no_answer() -> None:
    said = recorded("previews")
    cutter = Cutter()
    end = said.rindex(b"}\n")
    async with wire(cutter) as far:
        for at in places(said[: end + 1]):
            cutter.pieces = (said[:at],)
            with pytest.raises(MlxsupError):
                await read_all(await far.post())


def test_one_picture_is_a_long_line_and_the_other_answer_has_short_ones() -> None:
    """Both ways of passing on are tried."""
    longest = {name: max(map(len, body(recorded(name)).splitlines())) for name in ANSWERS}
    assert longest["previews"] < LONG_LINE < longest["picture"]
