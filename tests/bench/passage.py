"""What does a picture of 64 MiB cost on its way through the daemon? Beside parsing its line and writing it anew."""

from __future__ import annotations

from rich.table import Table

from tests.bench.figures import MIB, grid, median, peak, ratio, watch_peak
from tests.bench.relay import ask, sides

SIZE = 64 * MIB


async def measure(repeats: int) -> Table:
    """Ask each side in turn."""
    rounds = max(2, repeats // 5)
    table = grid(
        f"passage: one line with {SIZE // MIB} MiB of base64",
        f"medians of {rounds} answers; memory is the peak of the relaying process above what it had before",
        *("relay", "memory +MiB", "MiB/s", "/ daemon", "CPU ms", "/ daemon"),
    )
    async with sides("lines") as who:
        grown: dict[str, list[int]] = {side.name: [] for side in who}
        rates: dict[str, list[float]] = {side.name: [] for side in who}
        costs: dict[str, list[float]] = {side.name: [] for side in who}
        for side in who:
            await ask(side, f"picture {MIB}", 1)
        for _ in range(rounds):
            for side in who:
                before = watch_peak(side.pid)
                took, cpu, size = await ask(side, f"picture {SIZE}", 1)
                assert size > SIZE
                grown[side.name].append(peak(side.pid) - before)
                rates[side.name].append(size / MIB / took)
                costs[side.name].append(cpu)
    ours = who[1].name
    for side in who:
        rate, cost = median(rates[side.name]), median(costs[side.name])
        table.add_row(
            side.name,
            f"{median(grown[side.name]) / MIB:.1f}",
            f"{rate:.0f}",
            ratio(rate, median(rates[ours])),
            f"{cost * 1000:.0f}",
            ratio(cost, median(costs[ours])),
        )
    return table
