"""`mlxsup simulate`: what the scheduler would do with a load, in virtual time, beside other orders and the best there can be."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from mlxsup import config as configuration
from mlxsup.cli.options import Config, Json
from mlxsup.config import Settings, Size, rounded_size
from mlxsup.engines import ENGINES, KEYS
from mlxsup.errors import InvalidRequest
from mlxsup.simulation import RIVALS, TRACES, Outcome, Request, Setting, Simulated, bound, compare

LOAD_RATE = 1 << 30
"""Bytes a second at which the models of a configuration are thought to load, after a second for the program itself."""


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints; `bound` is the seconds of loads of one who knows the future."""

    models: int
    memory: int
    bound: float
    outcomes: dict[str, Outcome]


def simulate(
    trace: Annotated[
        str,
        Parameter(
            help=f"A kind of load ({', '.join(TRACES)}), with models made for it; or a file with a request a line, seconds"
            " from the start and the model's name, for the models of the configuration."
        ),
    ] = "zipf",
    /,
    *,
    models: Annotated[int, Parameter(help="How many models there are.")] = 40,
    rate: Annotated[float, Parameter(help="Requests a minute, on average.")] = 3.0,
    hours: Annotated[float, Parameter(help="How long it lasts.")] = 8.0,
    memory: Annotated[
        str, Parameter(help="What there is for models: 24GiB, or a share of what all need: 25%.")
    ] = "25%",
    seed: Annotated[int, Parameter(help="The same seed makes the same load.")] = 1,
    json: Json = False,
    config: Config = None,
) -> int:
    """Replay a load in virtual time and print what becomes of it: hits, loads, evictions, waits, refusals."""
    requests = round(rate * 60 * hours)
    if models < 1 or requests < 1 or rate <= 0:
        raise InvalidRequest("--models, --rate and --hours must be more than 0")
    setting = Setting(memory=0)
    if trace in TRACES:
        make_models, make_trace = TRACES[trace]
        luck = random.Random(seed)  # noqa: S311 - a load, no secret
        catalogue: Sequence[Simulated] = make_models(models, luck)
        load: Sequence[Request] = list(make_trace(catalogue, requests, rate / 60, luck))
    else:
        settings = configuration.read(config, KEYS)
        setting = _setting(settings)
        catalogue = [_of_configured(settings, name) for name in settings.models]
        load = sorted(_read(Path(trace), settings), key=lambda request: request.at)
    if not load:
        raise InvalidRequest(f"{trace} holds no request")
    setting = msgspec.structs.replace(setting, memory=_memory(memory, catalogue))
    least = bound(catalogue, load, setting)
    found = Simulation(
        models=len(catalogue), memory=setting.memory, bound=least, outcomes=compare(catalogue, load, setting)
    )
    if json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(found))
    return 0


def _memory(text: str, models: Sequence[Simulated]) -> int:
    try:
        if text.endswith("%"):
            size = int(float(text[:-1]) / 100 * sum(model.size for model in models))
        else:
            size = int(Size(text))
    except ValueError as error:
        raise InvalidRequest(f"--memory: {error}") from error
    return max(size, min(model.size for model in models))


def _setting(settings: Settings) -> Setting:
    common = settings.scheduler
    return Setting(
        memory=0,
        keep_alive=common.keep_alive,
        queue=common.queue,
        min_residency=common.min_residency,
        max_loaded=common.max_loaded,
    )


def _of_configured(settings: Settings, name: str) -> Simulated:
    model = settings.models[name]
    size = ENGINES[model.engine].need(model).total
    return Simulated(name=name, size=size, load=1.0 + size / LOAD_RATE)


def _read(path: Path, settings: Settings) -> Iterator[Request]:
    """Read a file of requests; names may be aliases."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        kinds = ", ".join(TRACES)
        raise InvalidRequest(f"{path}: {why}; a kind of load is one of {kinds}") from error
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
        yield Request(seconds, settings.resolve(name.strip()).name)


def _lines(found: Simulation) -> Iterator[str]:
    ours = found.outcomes[next(iter(RIVALS))]
    yield f"{ours.requests:,} requests for {found.models:,} models on {rounded_size(found.memory)}"
    yield (
        f"{'ORDER':18}{'HITS':>8}{'LOADS':>9}{'EVICTED':>9}{'REFUSED':>9}{'WAITED':>12}{'P50':>8}{'P99':>8}{'X BOUND':>9}"
    )
    for name, each in found.outcomes.items():
        ratio = f"{each.load_seconds / found.bound:.2f}" if found.bound else "-"
        yield (
            f"{name:18}{each.hits / each.requests:>8.1%}{each.loads:>9,}{each.evictions:>9,}{each.refused:>9,}"
            f"{each.waited:>10,.0f} s{each.p50:>6.1f} s{each.p99:>6.1f} s{ratio:>9}"
        )
    yield f"bound: {found.bound:,.0f} s of loads by one who knows the future; ours {ours.load_seconds:,.0f} s"
