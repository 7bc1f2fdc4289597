"""Loads replayed in virtual time: our order beside its rivals, and beside the best there can be."""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsup.cli import main
from mlxsup.simulation import RIVALS, TRACES, Outcome, Request, Setting, Simulated, compare, exact, farthest, replay
from mlxsup.simulation.comparing import scheduler_for

GIB = 1 << 30
OURS, *OTHERS = RIVALS


def outcomes(kind: str, seed: int, count: int, models: int, share: float, rate: float) -> dict[str, Outcome]:
    luck = random.Random(seed)
    make_models, make_trace = TRACES[kind]
    catalogue = make_models(models, luck)
    memory = max(*(model.size for model in catalogue), int(share * sum(model.size for model in catalogue)))
    trace = list(make_trace(catalogue, count, rate, luck))
    return compare(catalogue, trace, Setting(memory=memory, queue=10**6, min_residency=0.0))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", list(TRACES))
def test_ours_waits_no_longer_than_the_best_of_the_others(kind: str) -> None:
    runs = [outcomes(kind, seed, 2000, 40, 0.25, 0.05) for seed in range(3)]
    for figure in ("waited", "p99"):
        ours, *others = (median(getattr(run[name], figure) for run in runs) for name in RIVALS)
        assert ours <= 1.02 * min(others)
    if kind == "mixed":
        waited = {name: median(run[name].waited for run in runs) for name in RIVALS}
        assert waited[OURS] < min(waited[name] for name in OTHERS)


def test_figures_of_a_small_load() -> None:
    models = [Simulated(name=name, size=GIB, load=5.0, answer=1.0) for name in "ab"]
    trace = [Request(0.0, "a"), Request(10.0, "a"), Request(20.0, "b"), Request(20.0, "b"), Request(90.0, "a")]
    found = replay(scheduler_for(models, Setting(memory=GIB, concurrency=1), RIVALS[OURS]), models, trace)
    assert found.requests == 5
    assert found.hits == 1
    assert found.loads == 3
    assert found.load_seconds == 15.0
    assert found.evictions == 2
    assert found.refused == 0
    assert found.waited == pytest.approx(5 + 0 + 5.5 + 6.5 + 5.5)
    assert found.p99 == pytest.approx(6.5)


@pytest.mark.parametrize("seed", range(8))
def test_an_overload_comes_to_its_end_however_times_are_rounded(seed: int) -> None:
    """A timer that is due, and by another sum is not, would be due for ever."""
    luck = random.Random(seed)
    make_models, make_trace = TRACES["zipf"]
    models = make_models(10, luck)
    memory = sum(model.size for model in models) // 4
    setting = Setting(memory=memory, queue=10**6, min_residency=luck.uniform(1.0, 10.0))
    found = replay(scheduler_for(models, setting, RIVALS[OURS]), models, make_trace(models, 400, 1.0, luck))
    assert found.requests == 400
    assert found.events < 50 * found.requests


def test_what_is_refused_is_counted() -> None:
    models = [Simulated(name="a", size=GIB, load=5.0), Simulated(name="large", size=9 * GIB, load=5.0)]
    trace = [Request(0.0, "a"), Request(1.0, "large"), Request(2.0, "a")]
    found = replay(scheduler_for(models, Setting(memory=GIB), RIVALS[OURS]), models, trace)
    assert (found.refused, found.loads) == (1, 1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    picks=st.lists(st.integers(0, 4), min_size=1, max_size=14),
    capacity=st.integers(4, 9),
    equal=st.booleans(),
)
def test_who_knows_the_future_is_never_better_than_the_best(
    sizes: list[int], costs: list[int], picks: list[int], capacity: int, equal: bool
) -> None:
    models = [
        Simulated(name=f"m{number}", size=1 if equal else size, load=1.0 if equal else float(costs[number]))
        for number, size in enumerate(sizes)
    ]
    trace = [Request(float(at), f"m{pick % len(models)}") for at, pick in enumerate(picks)]
    capacity = 2 if equal else capacity
    near, least = farthest(models, trace, capacity), exact(models, trace, capacity)
    assert near >= least
    if equal:
        assert near == least


@pytest.mark.timeout(120)
def test_a_decision_is_quick_at_a_thousand_models() -> None:
    luck = random.Random(1)
    models = TRACES["zipf"][0](1000, luck)
    trace = list(TRACES["zipf"][1](models, 3000, 0.5, luck))
    scheduler = scheduler_for(models, Setting(memory=100 * GIB, queue=10**6, min_residency=0.0), RIVALS[OURS])
    began = time.process_time()
    found = replay(scheduler, models, trace)
    assert (time.process_time() - began) / found.events < 500e-6  # ten times what it takes


class TestCommand:
    def test_a_kind_of_load(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", "mixed", "--models", "10", "--hours", "1", "--rate", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("120 requests for 10 models on ")
        assert [line[:18].strip() for line in lines[2:7]] == list(RIVALS)
        assert lines[7].startswith("bound: ")

    def test_a_file_of_requests(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config, trace = tmp_path / "c.toml", tmp_path / "trace"
        entry = 'engine = "command"\ncommand = ["true"]\nmemory = "1GiB"\n'
        config.write_text(f'[models.a]\n{entry}aliases = ["x"]\n[models.b]\n{entry}')
        trace.write_text("# at, model\n0 a\n10 b\n\n30 x\n")
        assert main(["simulate", str(trace), "--config", str(config), "--memory", "1GiB"]) == 0
        assert capsys.readouterr().out.startswith("3 requests for 2 models on 1.0 GiB")
        trace.write_text("0 a\nsoon b\n")
        assert main(["simulate", str(trace), "--config", str(config)]) == 2
        assert f"{trace}:2: expected seconds and the name of a model, not 'soon b'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("simulate nowhere", "nowhere: No such file or directory; a kind of load is one of zipf"),
            ("simulate zipf --models 0", "--models, --rate and --hours must be more than 0"),
            ("simulate zipf --memory much", "--memory: expected a size"),
        ],
    )
    def test_wrong_usage(self, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(line.split()) == 2
        assert words in capsys.readouterr().err
