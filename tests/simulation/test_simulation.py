"""Loads replayed in virtual time: our order beside its rivals, and beside the best there can be."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsup.cli import main
from mlxsup.simulation import (
    RIVALS,
    TRACES,
    Outcome,
    Request,
    Setting,
    Simulated,
    bound,
    compare,
    exact,
    farthest,
    least,
    replay,
    scheduler_for,
)

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


def test_who_waits_when_the_model_is_put_out_and_loaded_again_is_no_hit() -> None:
    models = [Simulated(name=name, size=GIB, load=5.0, answer=10.0) for name in "ab"]
    trace = [Request(0.0, "a"), Request(6.0, "b"), Request(7.0, "a"), Request(8.0, "a"), Request(9.0, "a")]
    setting = Setting(memory=GIB, concurrency=1, min_residency=0.0)
    found = replay(scheduler_for(models, setting, RIVALS[OURS]), models, trace)
    assert found.served == ["a", "a", "b", "a", "a"]
    assert found.loads == 3
    assert found.hits == 1  # the second: a was ready when each of the last three came, but only that one had its turn


def test_what_is_refused_is_counted() -> None:
    models = [Simulated(name="a", size=GIB, load=5.0), Simulated(name="large", size=9 * GIB, load=5.0)]
    trace = [Request(0.0, "a"), Request(1.0, "large"), Request(2.0, "a")]
    found = replay(scheduler_for(models, Setting(memory=GIB), RIVALS[OURS]), models, trace)
    assert (found.refused, found.loads) == (1, 1)
    assert found.served == ["a", "a"]


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
    served = [f"m{pick % len(models)}" for pick in picks]
    capacity = 2 if equal else capacity
    near, best = farthest(models, served, capacity), exact(models, served, capacity)
    bound = least(models, served, capacity)
    assert bound <= best + 1e-9 <= near + 2e-9
    if equal:
        assert bound == best == near


@pytest.mark.parametrize("places", [1, 2, 7, 30])
def test_the_bound_of_equal_models_is_what_the_farthest_next_use_needs(places: int) -> None:
    luck = random.Random(places)
    models = TRACES["zipf"][0](40, luck)
    served = [luck.choice(models).name for _ in range(1000)]
    assert least(models, served, places * GIB) == farthest(models, served, places * GIB)
    assert least(models, [], GIB) == 0.0


@pytest.mark.parametrize("rate", [0.05, 2.0])
@pytest.mark.parametrize("kind", list(TRACES))
def test_nobody_is_better_than_the_bound_of_the_order_in_which_he_serves(kind: str, rate: float) -> None:
    luck = random.Random(3)
    make_models, make_trace = TRACES[kind]
    models = make_models(20, luck)
    sizes = [model.size for model in models]
    trace = list(make_trace(models, 600, rate, luck))
    for memory in (max(sizes), sum(sizes) // 3, sum(sizes) // 40):
        setting = Setting(memory=memory, queue=200)
        for name, found in compare(models, trace, setting).items():
            assert found.load_seconds >= bound(models, found, setting) - 1e-6, name
            assert len(found.served) + found.refused == found.requests == 600


def test_in_an_overload_the_order_in_which_they_came_is_no_bound() -> None:
    """Requests that wait share a load: so the bound is of the order in which they were served."""
    models = [Simulated(name=name, size=GIB, load=5.0) for name in "ab"]
    trace = [Request(0.1 * number, "ab"[number % 2]) for number in range(20)]
    setting = Setting(memory=GIB, min_residency=0.0)
    found = replay(scheduler_for(models, setting, RIVALS[OURS]), models, trace)
    assert found.load_seconds < farthest(models, [request.model for request in trace], GIB)
    assert found.load_seconds >= bound(models, found, setting)


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
        assert lines[8].startswith("offline: ")
        assert all(float(line.split()[-1]) >= 1 for line in lines[2:7])

    def test_without_rivals(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", "--models", "10", "--hours", "1", "--rate", "2", "--no-rivals"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["credit", "bound:", "offline:"]

    def test_as_json_it_has_the_same_figures(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", "--models", "5", "--hours", "1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found["outcomes"]) == list(RIVALS)
        ours = found["outcomes"][OURS]
        assert ours["load_seconds"] >= ours["bound"] > 0
        assert "served" not in ours
        assert (found["models"], found["unfit"]) == (5, 0)

    def test_a_file_of_requests(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config, trace = self.write(tmp_path, "0 a\n10 b\n\n30 x\n")
        assert main(["simulate", trace, "--config", config, "--memory", "1GiB"]) == 0
        assert capsys.readouterr().out.startswith("3 requests for 2 models on 1.0 GiB")

    def test_models_of_a_configuration_are_kept_as_it_says(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, trace = self.write(tmp_path, "0 a\n50 a\n100 a\n0 b\n50 b\n100 b\n", b="keep_alive = 0")
        assert main(["simulate", trace, "--config", config, "--memory", "4GiB", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["outcomes"][OURS]["loads"] == 1 + 3

    def test_models_of_a_configuration_under_a_kind_of_load(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, _ = self.write(tmp_path, "")
        assert main(["simulate", "bursts", "--config", config, "--hours", "1"]) == 0
        assert capsys.readouterr().out.startswith("180 requests for 2 models on 1.0 GiB")  # enough for the largest
        assert main(["simulate", "bursts", "--config", config, "--models", "3"]) == 2
        assert capsys.readouterr().err == "mlxsup: --models: leave it out, --config says which models there are\n"

    def test_models_that_never_fit_are_refused_and_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, trace = self.write(tmp_path, "0 a\n10 b\n20 b\n", b='memory = "2GiB"')
        assert main(["simulate", trace, "--config", config, "--memory", "1GiB"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "3 requests for 2 models on 1.0 GiB"
        assert lines[1] == "1 of the models need more than that: every request for them is refused"
        assert lines[3].split()[:5] == ["credit", "0.0%", "1", "0", "2"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("0 a\nsoon b\n", "2: expected seconds and the name of a model, not 'soon b'"),
            ("-1 a\n", "1: expected seconds"),
            ("nan a\n", "1: expected seconds"),
            ("5\n", "1: expected seconds"),
            ("0 a\n1 c\n", "2: no model is named 'c'"),
            ("# nothing\n\n", " holds no request"),
        ],
    )
    def test_a_file_that_is_no_load(
        self, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, trace = self.write(tmp_path, text)
        assert main(["simulate", trace, "--config", config]) == 2
        self.is_one_line(capsys, f"{trace}:{words}")

    @pytest.mark.parametrize("flag", ["--models", "--rate", "--hours", "--seed"])
    def test_what_makes_a_load_does_not_go_with_a_file(
        self, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, trace = self.write(tmp_path, "0 a\n")
        assert main(["simulate", trace, "--config", config, flag, "3"]) == 2
        self.is_one_line(capsys, f"{flag}: leave it out, the file {trace} is the load")

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("nowhere", "nowhere: No such file or directory; a kind of load is one of zipf"),
            ("/", "/: Is a directory; a kind of load is one of zipf"),
            ("--models 0", "--models: must be from 1 to 10,000, not 0"),
            ("--models 1000000", "--models: must be from 1 to 10,000, not 1,000,000"),
            ("--models x", 'Invalid value for --models: unable to convert "x" into int'),
            ("--rate 0", "--rate: must be a number more than 0, not 0"),
            ("--rate nan", "--rate: must be a number more than 0, not nan"),
            ("--hours=-1", "--hours: must be a number more than 0, not -1"),
            ("--hours inf", "--hours: must be a number more than 0, not inf"),
            ("--hours 1e-9", "--rate 3 for --hours 1e-09 makes no request; take more"),
            ("--hours 1e9", "makes 180,000,000,000 requests, at most 200,000 can be made; take less"),
            ("--rate 1e300 --hours 1e300", "at most 200,000 can be made; take less"),
            ("--memory much", "--memory: expected a size"),
            ("--memory 0", "--memory: no model fits into 0 B; give at least 1.0 GiB, the need of the smallest"),
            ("--memory 1%", "--memory: no model fits into 409.6 MiB; give at least 1.0 GiB"),
            ("--memory 0%", "--memory: expected a share of what all models need, such as 25%, not '0%'"),
            ("--memory=-5%", "--memory: expected a share of what all models need, such as 25%, not '-5%'"),
            ("--memory nan%", "--memory: expected a share of what all models need, such as 25%, not 'nan%'"),
            ("--memory inf%", "--memory: expected a share of what all models need, such as 25%, not 'inf%'"),
            ("--memory %", "--memory: expected a share of what all models need, such as 25%, not '%'"),
            ("--memory 1e300%", "--memory: expected a share of what all models need"),
            ("--config /nowhere", "/nowhere: cannot be read: No such file or directory"),
        ],
    )
    def test_wrong_usage(self, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", *line.split()]) == 2
        self.is_one_line(capsys, words)

    def write(self, folder: Path, trace: str, **models: str) -> tuple[str, str]:
        """Write a configuration of two models, a (or x) and b, with these keys beside the usual ones, and a load."""
        text = ""
        for name in "ab":
            keys = models.get(name, "")
            memory = "" if "memory" in keys else 'memory = "1GiB"\n'
            aliases = 'aliases = ["x"]\n' if name == "a" else ""
            text += f'[models.{name}]\nengine = "command"\ncommand = ["true"]\n{memory}{aliases}{keys}\n'
        (folder / "c.toml").write_text(text)
        (folder / "trace").write_text(trace)
        return str(folder / "c.toml"), str(folder / "trace")

    def is_one_line(self, capsys: pytest.CaptureFixture[str], words: str) -> None:
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("mlxsup: ")
        assert error.count("\n") == 1
