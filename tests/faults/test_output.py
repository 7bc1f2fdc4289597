"""What a runner writes, or no longer writes, to its stdout and stderr disturbs nobody."""

from __future__ import annotations

import anyio
import pytest

from mlxsup.errors import RunnerDied
from mlxsup.testing import fake_runner

from .house import LoopLag, collect, kill, promised, report, rss, state_is, supervisor, words

MIB = 1 << 20


async def test_a_hundred_megabytes_without_newline_cost_no_memory_and_block_nobody() -> None:
    async with supervisor(m=fake_runner("flood@1=100; stderr@1=the tail; delay=0.05; tokens=2")) as sup:
        await sup.load("m")
        await anyio.sleep(0.1)
        grown: list[int] = []

        async def attempt() -> float:
            lag = LoopLag()
            before = rss()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lag.measure)
                assert words(await collect(sup)) == "t1 t2 "
                tasks.cancel_scope.cancel()
            grown.append(rss() - before)
            return lag.at(0.99)

        await promised(0.02, attempt)
        assert min(grown) < 2 * MIB
        assert report(sup).state == "ready"
        assert sup.logs("m")[-1].endswith("the tail")
        assert sum(map(len, sup.logs("m"))) < 64 * 1024


@pytest.mark.parametrize("kind", ["plain", "lines", "bars", "binary", "utf8"])
async def test_any_kind_of_flood_while_loading_and_answering(kind: str) -> None:
    async with supervisor(
        m=fake_runner(f"flood@loading=4:{kind}; flood@1=4:{kind}; stderr@1=; stderr@1=done with it")
    ) as sup:
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert report(sup).state == "ready"
        assert sup.logs("m")[-1] == "done with it"
        assert all(line.isprintable() or "\t" in line for line in sup.logs("m"))
        assert sum(map(len, sup.logs("m"))) < 2 * MIB


async def test_flood_just_before_the_crash_keeps_the_last_words() -> None:
    async with supervisor(m=fake_runner("flood@crash=8:lines; stderr@crash=the last word; crash@1")) as sup:
        with pytest.raises(RunnerDied) as caught:
            await collect(sup)
        assert caught.value.details["last_words"][-1].endswith("the last word")
        assert len(caught.value.details["last_words"]) <= 121


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("phase", ["start", "loading", "ready", "1"])
async def test_closed_output_is_not_death(which: str, phase: str) -> None:
    async with supervisor(m=fake_runner(f"stderr@start=hello; close@{phase}={which}; delay=0.02")) as sup:
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert report(sup).state == "ready"
        assert report(sup).exits == 0
        assert sup.logs("m") == ["hello"]
        kill(report(sup).pid)
        await state_is(sup, "failed", "backoff", limit=1.0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"\xff\xfe caf\xe9", "\ufffd\ufffd caf\ufffd"),
        (r"10%\r50%\r100%", "100%"),
        (r"a\x00b\x1b[31mred\x1b[0m", "abred"),
        (r"caf\xc3\xa9", "café"),
    ],
)
async def test_odd_text_is_shown_as_well_as_can_be(text: str, shown: str) -> None:
    async with supervisor(m=fake_runner(f"stderr@loading={text}")) as sup:
        await sup.load("m")
        assert sup.logs("m") == [shown]


async def test_words_without_newline_at_the_end_are_kept() -> None:
    async with supervisor(m=fake_runner("flood@crash=0.01; crash@1")) as sup:
        with pytest.raises(RunnerDied, match="xxxx"):
            await collect(sup)


async def test_words_on_stdout_alone_count_as_last_words() -> None:
    async with supervisor(m=fake_runner("stdout@crash=Error: no such device; exit@1=2")) as sup:
        with pytest.raises(RunnerDied, match="no such device"):
            await collect(sup)
