"""Gates hold fake runners from inside an event loop."""

from __future__ import annotations

import anyio

from mlxsup.testing import Gate

from .scripted import Scripted


async def test_gate_names_the_phase_and_lets_go() -> None:
    async with Gate() as gate:
        with Scripted(f"gate@bind={gate.path}; gate@ready={gate.path}; exit@ready=0", wait="") as runner:
            with anyio.fail_after(10):
                first = await gate.arrival()
                assert first.phase == "bind"
                first.go()
                second = await gate.arrival("ready")
                second.go()
            assert await anyio.to_thread.run_sync(runner.ended) == 0


async def test_arrival_of_one_phase_lets_the_others_go_on() -> None:
    async with Gate() as gate:
        with Scripted(f"gate@start={gate.path}; gate@bind={gate.path}; gate@loading={gate.path}", wait=""):
            with anyio.fail_after(10):
                assert (await gate.arrival("loading")).phase == "loading"


async def test_open_gate_lets_all_go_on() -> None:
    async with Gate() as gate:
        with Scripted(f"gate@start={gate.path}; gate@bind={gate.path}; exit@bind=0", wait="") as runner:
            with anyio.fail_after(10):
                arrival = await gate.arrival()
                gate.open()
                arrival.go()
            assert await anyio.to_thread.run_sync(runner.ended) == 0


async def test_left_returns_when_the_runner_dies() -> None:
    async with Gate() as gate:
        with Scripted(f"gate@start={gate.path}", wait="") as runner:
            with anyio.fail_after(10):
                arrival = await gate.arrival()
                runner.child.kill()
                await arrival.left()


async def test_closing_the_gate_lets_go_who_stands_there() -> None:
    async with Gate() as gate:
        with Scripted(f"gate@start={gate.path}; exit@start=0", wait="") as runner:
            with anyio.fail_after(10):
                await gate.arrival()
                await gate.__aexit__(None, None, None)
            assert await anyio.to_thread.run_sync(runner.ended) == 0
