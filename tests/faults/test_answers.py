"""Answers that are cut, split, malformed or empty: exact chunks or a typed error, never a clean end without `done`."""

from __future__ import annotations

import itertools
import time
from typing import Any

import anyio
import pytest

from mlxsup import CompletionChunk
from mlxsup.errors import BadAnswer, MlxsupError, RunnerDied, RunnerError, Stalled
from mlxsup.testing import fake_runner, picture
from tests.waiting import LIMIT, until

from .house import collect, report, rss, supervisor, words

ADDRESSES = pytest.mark.parametrize("address", ["unix", "tcp"])
MIB = 1 << 20


async def outcome(sup: Any, model: str = "m") -> tuple[list[CompletionChunk], MlxsupError | None]:
    """The chunks of an answer and the error it ended with."""
    chunks: list[CompletionChunk] = []
    try:
        async for chunk in sup.completion(model, prompt="p"):
            chunks.append(chunk)  # noqa: PERF401 - those before an error count
    except MlxsupError as error:
        return chunks, error
    return chunks, None


@pytest.mark.parametrize("http", ["1.0", "1.1"])
@pytest.mark.parametrize("cut", ["close", "end", "reset"])
async def test_an_answer_cut_at_any_offset_is_an_error(http: str, cut: str) -> None:
    short = 'tokens=2; line@final={"done":true}; finish@final'
    length = len('{"content":"t1 "}\n{"content":"t2 "}\n{"done":true}')  # with its newline missing it is whole
    entry = fake_runner(f"http={http}; truncate=each; cut={cut}; {short}", concurrency=100)
    found: dict[int, tuple[list[CompletionChunk], MlxsupError | None]] = {}
    async with supervisor(m=entry) as sup:
        await sup.load("m")

        async def one() -> None:
            chunks, error = await outcome(sup)
            found[len(found)] = (chunks, error)

        async with anyio.create_task_group() as tasks:
            for _ in range(length):
                tasks.start_soon(one)
        assert report(sup).state == "ready"
        await until(lambda: report(sup).leases == 0)
        last = await outcome(sup)
    assert [error for chunks, error in found.values() if not isinstance(error, BadAnswer)] == []
    assert not any(chunk.done for chunks, _ in found.values() for chunk in chunks)
    by_words = [words(chunks) for chunks, _ in found.values()]
    if cut != "reset":  # which may take delivered bytes with it
        assert sorted(by_words) == sorted([""] * 18 + ["t1 "] * 18 + ["t1 t2 "] * (length - 36))
    assert set(by_words) <= {"", "t1 ", "t1 t2 "}
    assert last[1] is None
    assert last[0][-1].done


@ADDRESSES
async def test_an_answer_split_anywhere_is_whole(address: Any) -> None:
    async with supervisor(m=fake_runner("tokens=2; split=each; pause=0.0005", address=address, concurrency=8)) as sup:
        answers: list[str] = []

        async def one() -> None:
            chunks = await collect(sup)
            assert chunks[-1].done
            answers.append(words(chunks))

        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                tasks.start_soon(one)
        assert answers == ["t1 t2 "] * 60


@pytest.mark.parametrize("cut", ["close", "end", "reset", "crash"])
async def test_half_a_line_is_never_a_chunk(cut: str) -> None:
    async with supervisor(m=fake_runner(f"half@1; cut={cut}")) as sup:
        chunks, error = await outcome(sup)
        assert isinstance(error, RunnerDied if cut == "crash" else BadAnswer)
        assert words(chunks) in ({"t1 "} if cut in ("close", "end") else {"", "t1 "})


@pytest.mark.parametrize(
    "line",
    [
        "no json at all",
        '{"content": 5}',
        '["content"]',
        '{"content":"x"',
        '{"content":"a"} {"content":"b"}',
        r"\x00\x00\x00",
        r'{"content":"a\x00b"}',
        r'{"content":"\xff\xfe"}',
        "null",
        '{"done":"yes"}',
        '{"step":-1e400}',
    ],
)
async def test_a_line_that_is_no_chunk_is_an_error_and_skips_nothing(line: str) -> None:
    async with supervisor(m=fake_runner(f"line@2={line}")) as sup:
        chunks, error = await outcome(sup)
        assert isinstance(error, BadAnswer)
        assert words(chunks) == "t1 t2 "
        assert report(sup).state == "ready"
        await until(lambda: report(sup).leases == 0)


async def test_an_escaped_nul_arrives_as_one_and_unknown_fields_do_no_harm() -> None:
    line = r'{"content":"a\\u0000b","tomorrow":[{"x":null}]}'
    async with supervisor(m=fake_runner(f"tokens=0; line@first={line}")) as sup:
        assert words(await collect(sup)) == "a\0b"


async def test_blank_lines_are_no_chunks() -> None:
    async with supervisor(m=fake_runner(r"tokens=2; line@1=; line@1=\r")) as sup:
        assert words(await collect(sup)) == "t1 t2 "


@pytest.mark.parametrize("scenario", ["done=no", "tokens=0; done=no", "steps=2; done=no", "finish@first"])
async def test_an_end_without_done_is_an_error(scenario: str) -> None:
    async with supervisor(m=fake_runner(scenario)) as sup:
        chunks, error = await outcome(sup)
        assert isinstance(error, BadAnswer)
        assert not any(chunk.done for chunk in chunks)
        assert report(sup).state == "ready"


async def test_death_instead_of_the_last_line_is_told_from_misbehaviour() -> None:
    async with supervisor(m=fake_runner("http=1.0; exit@final=7; stderr@crash=no more paper")) as sup:
        _, error = await outcome(sup)
        assert isinstance(error, RunnerDied)
        assert error.details["exit_code"] == 7
        assert error.details["last_words"] == ["no more paper"]


async def test_done_without_the_picture_it_promised_is_an_error() -> None:
    async with supervisor(m=fake_runner("steps=2; stderr@final=vae gave nothing")) as sup:
        chunks, error = await outcome(sup)
        assert isinstance(error, BadAnswer)
        assert [chunk.step for chunk in chunks] == [0, 1, 2]
        assert error.details["last_words"] == ["vae gave nothing"]


async def test_an_error_in_the_last_line_is_an_error() -> None:
    async with supervisor(m=fake_runner("image=10; error@2=out of memory")) as sup:
        chunks, error = await outcome(sup)
        assert isinstance(error, RunnerError)
        assert error.message == "out of memory"
        assert len(chunks) == 2


async def test_a_text_that_begins_with_error_is_a_text() -> None:
    async with supervisor(m=fake_runner('tokens=0; line@first={"content":"error: is a word"}')) as sup:
        assert words(await collect(sup)) == "error: is a word"


@pytest.mark.parametrize(
    ("told", "status", "message"),
    [
        ("400: width must be a multiple of 16 \\n", 400, "width must be a multiple of 16"),
        ('422:{"error":"no such option"}', 422, "no such option"),
        ('503:{"error":{"message":"busy","code":9}}', 503, "busy"),
        ("500:\\xff\\x00", 500, None),
        ("201:", 502, "scripted refusal"),
        ("302:elsewhere", 502, "elsewhere"),
    ],
)
async def test_a_refusal_is_the_runners_own_message_and_status(told: str, status: int, message: str | None) -> None:
    async with supervisor(m=fake_runner(f"status={told}")) as sup:
        _, error = await outcome(sup)
        assert isinstance(error, RunnerError)
        assert error.status == status
        assert error.message
        assert message is None or error.message == message
        assert report(sup).state == "ready"
        await until(lambda: report(sup).leases == 0)


@ADDRESSES
async def test_a_large_picture_arrives_byte_for_byte(address: Any) -> None:
    async with supervisor(m=fake_runner(f"image={17 * MIB}; steps=1", address=address)) as sup:
        *_, last = await collect(sup)
        assert last.image_bytes() == picture(17 * MIB)


async def test_a_line_of_64_megabytes_arrives() -> None:
    async with supervisor(m=fake_runner("tokens=1; big@1=64")) as sup:
        chunks = await collect(sup)
        assert [len(chunk.content) for chunk in chunks] == [3, 64 * MIB, 0]


async def test_a_slow_reader_costs_little_memory() -> None:
    scenario = "tokens=1; " + "; ".join(["big@1=0.0625"] * 400)
    async with supervisor(m=fake_runner(scenario)) as sup, sup.completion("m", prompt="p") as chunks:
        await anext(chunks)
        before = rss()
        await anyio.sleep(0.5)
        assert rss() - before < 3 * MIB
        assert len([chunk async for chunk in chunks]) == 401


@ADDRESSES
async def test_each_chunk_arrives_when_it_is_sent(address: Any) -> None:
    async with supervisor(m=fake_runner("delay=0.15", address=address)) as sup:
        at = [time.monotonic() async for _ in sup.completion("m", prompt="p")]
        assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(at[:-1]))


@pytest.mark.parametrize(("phase", "limit"), [("request", "first_chunk"), ("first", "first_chunk"), ("2", "silence")])
async def test_silence_is_an_error_after_its_limit(phase: str, limit: str) -> None:
    limits: dict[str, Any] = {"first_chunk_timeout": "5s", "silence_timeout": "5s", f"{limit}_timeout": "0.8s"}
    async with supervisor(m=fake_runner(f"hang@{phase}#1", **limits)) as sup:
        await sup.load("m")
        began = time.monotonic()
        _, error = await outcome(sup)
        assert isinstance(error, Stalled)
        assert 0.8 <= time.monotonic() - began < 3
        assert error.details["limit"] == 0.8
        assert type(error.details["limit"]) is float, "a number in JSON, too"
        with anyio.fail_after(LIMIT):
            assert words(await collect(sup)) == "t1 t2 t3 "


async def test_what_the_request_said_reaches_the_runner_and_the_seed_comes_back() -> None:
    async with supervisor(m=fake_runner("image=10")) as sup:
        *steps, last = await collect(sup, steps=3, seed=7, width=64, height=64)
        assert [(chunk.step, chunk.total) for chunk in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert last.seed == 7
        *_, last = await collect(sup)
        assert last.seed
