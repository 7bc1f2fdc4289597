"""`mlxsup simulate`: what the scheduler would do with a load, in virtual time, beside other orders and the best there can be."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from cyclopts import Parameter

from mlxsup import config as configuration
from mlxsup.cli.options import Config, Json
from mlxsup.cli.streams import json_line
from mlxsup.config import Settings, Size, rounded_size
from mlxsup.engines import ENGINES, KEYS
from mlxsup.errors import InvalidRequest, ModelNotFound
from mlxsup.policies import policy
from mlxsup.simulation import OURS, RIVALS, TRACES, Outcome, Request, Setting, Simulated, bound, compare, farthest

LOAD_RATE = 1 << 30
"""Bytes a second at which the models of a configuration are thought to load, after a second for the program itself."""

MOST_MODELS: Final = 10_000
MOST_REQUESTS: Final = 200_000
"""Of a made load: what some minutes are enough for. The time grows with the product of both, the memory with their sum."""

MODELS, RATE, HOURS, SEED, SHARE = 40, 3.0, 8.0, 1, "25%"


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a load, by order.

    Attributes:
        models: how many there are.
        memory: bytes for them.
        unfit: how many of them need more than that.
        outcomes: ours first.
        bounds: seconds of loads that nobody does with less of who serves requests in the order in which this one did.
        offline: seconds of loads of one who knows the future and serves them in the order in which ours did.
    """

    models: int
    memory: int
    unfit: int
    outcomes: dict[str, Outcome]
    bounds: dict[str, float]
    offline: float


def simulate(
    trace: Annotated[
        str,
        Parameter(
            help=f"A kind of load ({', '.join(TRACES)}), with models made for it, or those of --config; or a file with a"
            " request a line, seconds from the start and the model's name, for the models of the configuration."
        ),
    ] = "zipf",
    /,
    *,
    models: Annotated[int | None, Parameter(help=f"How many models there are; {MODELS} unless set.")] = None,
    rate: Annotated[float | None, Parameter(help=f"Requests a minute, on average; {RATE:g} unless set.")] = None,
    hours: Annotated[float | None, Parameter(help=f"How long it lasts; {HOURS:g} unless set.")] = None,
    memory: Annotated[
        str | None,
        Parameter(
            help=f"What there is for models: 24GiB, or a share of what all need, 50%; {SHARE}, or enough for the largest, unless"
            " set."
        ),
    ] = None,
    seed: Annotated[int | None, Parameter(help=f"The same seed makes the same load; {SEED} unless set.")] = None,
    rivals: Annotated[
        bool, Parameter(help="Whether other orders of eviction are tried, too: five times the work.")
    ] = True,
    json: Json = False,
    config: Config = None,
) -> int:
    """Replay a load in virtual time and print what becomes of it: hits, loads, evictions, waits, refusals."""
    setting = Setting(memory=0)
    if trace in TRACES:
        count = _requests(RATE if rate is None else rate, HOURS if hours is None else hours)
        if config is not None and models is not None:
            raise InvalidRequest("--models: leave it out, --config says which models there are")
        make_models, make_trace = TRACES[trace]
        luck = random.Random(SEED if seed is None else seed)  # noqa: S311 - a load, no secret
        if config is None:
            catalogue: Sequence[Simulated] = make_models(_checked_models(MODELS if models is None else models), luck)
        else:
            setting, catalogue = _configured(configuration.read(config, KEYS))
        load: Sequence[Request] = list(make_trace(catalogue, count, (RATE if rate is None else rate) / 60, luck))
    else:
        for flag, value in (("--models", models), ("--rate", rate), ("--hours", hours), ("--seed", seed)):
            if value is not None:
                raise InvalidRequest(f"{flag}: leave it out, the file {trace} is the load")
        settings = configuration.read(config, KEYS)
        load = sorted(_read(Path(trace), settings), key=lambda request: request.at)
        setting, catalogue = _configured(settings)
    setting = msgspec.structs.replace(setting, memory=_memory(memory, catalogue))
    found = _simulate(catalogue, load, setting, [*RIVALS] if rivals else [OURS])
    if json:
        sys.stdout.write(json_line(_as_json(found)))
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(found))
    return 0


def _simulate(
    models: Sequence[Simulated], load: Sequence[Request], setting: Setting, names: Sequence[str]
) -> Simulation:
    outcomes = compare(models, load, setting, names)
    return Simulation(
        models=len(models),
        memory=setting.memory,
        unfit=sum(model.size > setting.memory for model in models),
        outcomes=outcomes,
        bounds={name: bound(models, outcome, setting) for name, outcome in outcomes.items()},
        offline=farthest(models, outcomes[OURS].served, setting.memory),
    )


# What was asked for


def _checked_models(count: int) -> int:
    if not 1 <= count <= MOST_MODELS:
        raise InvalidRequest(f"--models: must be from 1 to {MOST_MODELS:,}, not {count:,}")
    return count


def _requests(rate: float, hours: float) -> int:
    for flag, value in (("--rate", rate), ("--hours", hours)):
        if not 0 < value < math.inf:
            raise InvalidRequest(f"{flag}: must be a number more than 0, not {value:g}")
    requests = rate * 60 * hours
    if not 1 <= requests <= MOST_REQUESTS:
        many = f"{requests:,.0f} requests, at most {MOST_REQUESTS:,} can be made" if requests > 1 else "no request"
        raise InvalidRequest(
            f"--rate {rate:g} for --hours {hours:g} makes {many}; take {'less' if requests > 1 else 'more'}"
        )
    return round(requests)


def _memory(text: str | None, models: Sequence[Simulated]) -> int:
    if text is None:
        return max(_share(SHARE[:-1], models), *(model.size for model in models))
    try:
        size = _share(text[:-1], models) if text.endswith("%") else int(Size(text))
    except ValueError as error:
        raise InvalidRequest(f"--memory: {error}") from error
    smallest = min(model.size for model in models)
    if size < smallest:
        raise InvalidRequest(
            f"--memory: no model fits into {rounded_size(size)}; give at least {rounded_size(smallest)}, the need of the"
            " smallest"
        )
    return size


def _share(text: str, models: Sequence[Simulated]) -> int:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 100:
        raise ValueError(f"expected a share of what all models need, such as 25%, not {text + '%'!r}")
    return int(share / 100 * sum(model.size for model in models))


def _configured(settings: Settings) -> tuple[Setting, Sequence[Simulated]]:
    """Return what a configuration says, without the memory, and its models."""
    common = settings.scheduler
    if not settings.models:
        raise InvalidRequest(f"{settings.source} names no model")
    setting = Setting(
        memory=0,
        queue=common.queue,
        min_residency=common.min_residency,
        max_loaded=common.max_loaded,
        own={name: policy(model, settings, ()) for name, model in settings.models.items()},
    )
    return setting, [_of_configured(settings, name) for name in settings.models]


def _of_configured(settings: Settings, name: str) -> Simulated:
    model = settings.models[name]
    size = ENGINES[model.engine].need(model).total
    return Simulated(name=name, size=size, load=1.0 + size / LOAD_RATE)


def _read(path: Path, settings: Settings) -> Iterator[Request]:
    """Read a file of requests; names may be aliases."""
    kinds = f"; a kind of load is one of {', '.join(TRACES)}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror or error}{kinds}") from error
    except ValueError as error:  # no text, or no name of a file
        raise InvalidRequest(f"{path}: no text{kinds}") from error
    found = False
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        at, _, name = line.strip().partition(" ")
        try:
            seconds = float(at)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf or not name.strip():
            raise InvalidRequest(f"{path}:{number}: expected seconds and the name of a model, not {line!r}")
        try:
            model = settings.resolve(name.strip())
        except ModelNotFound as error:
            raise InvalidRequest(f"{path}:{number}: {error.message}") from error
        found = True
        yield Request(seconds, model.name)
    if not found:
        raise InvalidRequest(f"{path}: holds no request")


# What is printed


def _as_json(found: Simulation) -> dict[str, Any]:
    outcomes = {}
    for name, outcome in found.outcomes.items():
        figures = msgspec.structs.asdict(outcome)
        del figures["served"]
        outcomes[name] = {**figures, "bound": found.bounds[name]}
    facts = {"models": found.models, "memory": found.memory, "unfit": found.unfit, "offline": found.offline}
    return {**facts, "outcomes": outcomes}


def _lines(found: Simulation) -> Iterator[str]:
    ours = found.outcomes[OURS]
    yield f"{ours.requests:,} requests for {found.models:,} models on {rounded_size(found.memory)}"
    if found.unfit:
        yield f"{found.unfit:,} of the models need more than that: every request for them is refused"
    yield (
        f"{'ORDER':18}{'HITS':>8}{'LOADS':>9}{'EVICTED':>9}{'REFUSED':>9}{'WAITED':>12}{'P50':>8}{'P99':>8}{'X BOUND':>9}"
    )
    for name, each in found.outcomes.items():
        ratio = f"{each.load_seconds / found.bounds[name]:.2f}" if found.bounds[name] else "-"
        yield (
            f"{name:18}{each.hits / each.requests:>8.1%}{each.loads:>9,}{each.evictions:>9,}{each.refused:>9,}"
            f"{each.waited:>10,.0f} s{each.p50:>6.1f} s{each.p99:>6.1f} s{ratio:>9}"
        )
    yield (
        f"bound: {found.bounds[OURS]:,.0f} s of loads, at least, for whoever serves in the order in which {OURS} did"
        f" with {ours.load_seconds:,.0f} s"
    )
    yield f"offline: {found.offline:,.0f} s, in that order, by one who knows the future"
