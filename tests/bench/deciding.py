"""The scheduler alone, in virtual time: what a decision costs, and what its order of eviction is worth beside others."""

from __future__ import annotations

import random
import time

from rich.table import Table

from mlxsup.simulation import OURS, RIVALS, TRACES, Setting, compare, farthest, replay, scheduler_for
from tests.bench.figures import grid, median

SEEDS = 20
REQUESTS = 3000
GIB = 1 << 30


async def cost(repeats: int) -> Table:
    """Return the CPU time of one event by the number of models, a tenth of which are loaded."""
    del repeats
    table = grid("a decision", "zipf, 20,000 requests; a tenth of the models fit", "models", "loaded", "us an event")
    for count in (10, 100, 1000, 10_000):
        luck = random.Random(1)
        make_models, make_trace = TRACES["zipf"]
        models = make_models(count, luck)
        trace = list(make_trace(models, 20_000, 0.0005 * count, luck))
        loaded = max(1, count // 10)
        setting = Setting(memory=loaded * GIB, queue=10**6, min_residency=0.0)
        scheduler = scheduler_for(models, setting, RIVALS[OURS])
        began = time.process_time()
        found = replay(scheduler, models, trace)
        table.add_row(f"{count:,}", f"{loaded:,}", f"{(time.process_time() - began) / found.events * 1e6:.0f}")
    return table


async def orders(repeats: int) -> Table:
    """Return how long requests wait under each order, and how far that is from who knows the future."""
    del repeats
    caption = f"seconds waited in all / by 99 of 100; medians of {SEEDS} seeds, {REQUESTS:,} requests, 40 models, a quarter fits"
    table = grid("who goes", caption, "load", *RIVALS, "loads x offline")
    for kind, (make_models, make_trace) in TRACES.items():
        runs, ratios = [], []
        for seed in range(SEEDS):
            luck = random.Random(seed)
            models = make_models(40, luck)
            trace = list(make_trace(models, REQUESTS, 0.05, luck))
            sizes = [model.size for model in models]
            setting = Setting(memory=max(*sizes, sum(sizes) // 4), queue=10**6, min_residency=0.0)
            runs.append(compare(models, trace, setting))
            ours = runs[-1][OURS]
            ratios.append(ours.load_seconds / farthest(models, ours.served, setting.memory))
        cells = [
            f"{median([run[name].waited for run in runs]):,.0f} / {median([run[name].p99 for run in runs]):.1f}"
            for name in RIVALS
        ]
        table.add_row(kind, *cells, f"{median(ratios):.2f}")
    return table
