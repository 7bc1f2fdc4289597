"""What can be set, as typed structs: each key with its default and its one line.

These structs are the only source of the keys: the parser, the JSON schema and `config.example.toml` are made from them. The
keys an engine adds are a struct of the engine's own, kept in `ModelSettings.options`.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlxsup.config.rules import (
    Count,
    EnvironmentName,
    EnvironmentValue,
    HealthPath,
    Interval,
    ListenAddress,
    ModelName,
    PathText,
    PositiveSize,
    SignalName,
    Timeout,
    WebOrigin,
)
from mlxsup.config.units import Duration, Size
from mlxsup.errors import ModelNotFound

_SHOWN = 200
"""Characters of an unknown model's name that are looked at and told again: clients send names of any length."""

BUILT_IN = "built in"
"""`Settings.source` when no file was read."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[server]`: the HTTP API of `mlxsup serve`."""

    listen: Annotated[
        list[ListenAddress],
        Meta(min_length=1, description="addresses of the HTTP API: host:port, [IPv6]:port or unix:/path"),
    ] = msgspec.field(default_factory=lambda: ["127.0.0.1:11435"])
    origins: Annotated[
        list[WebOrigin],
        Meta(description='web pages that may use it, beside this machine\'s own: "https://ai.example.com"; "*": all'),
    ] = []
    max_body: Annotated[PositiveSize, Meta(description="the largest request body that is read")] = Size("64MiB")
    header_timeout: Annotated[
        Timeout, Meta(description="for the head of a request, and for silence within its body")
    ] = Duration("10s")
    write_timeout: Annotated[
        Timeout, Meta(description="a client that takes nothing of its answer for so long is left")
    ] = Duration("60s")


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[scheduler]`: what holds for all models unless a model says otherwise."""

    keep_alive: Annotated[
        Duration, Meta(description="an idle model is unloaded after this; 0: at once, negative: never")
    ] = Duration("5m")
    load_timeout: Annotated[Timeout, Meta(description="a load that shows no progress for this long has failed")] = (
        Duration("5m")
    )
    queue: Annotated[Count, Meta(description="requests that may wait at once, in all")] = 512
    overhead: Annotated[Size, Meta(description="memory kept free on every device, beyond its own minimum")] = Size(0)
    max_loaded: Annotated[int, Meta(ge=0, description="models loaded at once; 0: as many as memory holds")] = 0
    min_residency: Annotated[
        Interval, Meta(description="a model that became ready is not put out for others before this has passed")
    ] = Duration("5s")


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[models.NAME]` that every engine has; None means "as the scheduler or the engine has it".

    `name` is the table's name and `options` the engine's own keys: neither is a key in the file.
    """

    name: str
    engine: Annotated[str, Meta(description="the kind of runner")]
    path: Annotated[
        PathText, Meta(description="the model: a file, a folder or builtin:NAME", examples=["~/models/one"])
    ] = ""
    memory: Annotated[
        PositiveSize | None,
        Meta(description="what it needs; unset: reckoned from the headers of its files", examples=["4GiB"]),
    ] = None
    device: Annotated[
        str, Meta(description='"cpu", "metal", "cuda:0" ..., or "auto"; "": the machine\'s memory', examples=["cuda:0"])
    ] = ""
    devices: Annotated[Count, Meta(description="spread it over as many cards as it needs, up to this number")] = 1
    aliases: Annotated[list[ModelName], Meta(description="other names it answers to")] = []
    priority: Annotated[
        Literal["high", "normal", "low"], Meta(description="who is served first, and stays: high | normal | low")
    ] = "normal"
    pinned: Annotated[
        bool, Meta(description="never put out for others or for being idle; loaded again after a crash")
    ] = False
    preload: Annotated[bool, Meta(description="loaded at the start, if it fits beside those before it")] = False
    comes_back: Annotated[bool, Meta(description="once put out for another, it is loaded again when there is room")] = (
        msgspec.field(default=False, name="return")
    )
    keep_alive: Annotated[
        Duration | None, Meta(description="idle time before it is unloaded; unset: [scheduler]", examples=["5m"])
    ] = None
    load_timeout: Annotated[
        Timeout | None, Meta(description="load time without progress; unset: [scheduler]", examples=["5m"])
    ] = None
    load_cap: Annotated[Timeout, Meta(description="the longest a load may take, with progress or without")] = Duration(
        "30m"
    )
    first_chunk_timeout: Annotated[Timeout, Meta(description="from the request to the first piece of its answer")] = (
        Duration("10m")
    )
    queue_timeout: Annotated[Timeout, Meta(description="from the request to its turn, a load included")] = Duration(
        "1h"
    )
    silence_timeout: Annotated[Timeout, Meta(description="between two pieces of an answer")] = Duration("60s")
    connect_timeout: Annotated[Timeout, Meta(description="to reach the runner")] = Duration("2s")
    drain_timeout: Annotated[Interval, Meta(description="work in flight may take this long when it is unloaded")] = (
        Duration("30s")
    )
    stop_grace: Annotated[Interval, Meta(description="from the stop signal to SIGKILL")] = Duration("10s")
    probe_interval: Annotated[
        Timeout, Meta(description="between two looks at whether a ready runner still answers")
    ] = Duration("5s")
    probe_timeout: Annotated[
        Timeout, Meta(description="a look that takes longer is missed; three in a row are too many")
    ] = Duration("2s")
    concurrency: Annotated[
        Count | None, Meta(description="requests at once; unset: the engine's own", examples=[1])
    ] = None
    queue: Annotated[
        Count | None, Meta(description="requests that may wait for it; unset: [scheduler]", examples=[512])
    ] = None
    env: Annotated[
        dict[EnvironmentName, EnvironmentValue],
        Meta(description="set in the runner's environment; ${VAR} is filled in at its start"),
    ] = {}
    pass_env: Annotated[
        list[EnvironmentName], Meta(description="variables passed on beside the usual ones (PATH, HOME, CUDA_* ...)")
    ] = []
    python: Annotated[PathText, Meta(description='interpreter of Python runners; "": the one mlxsup runs in')] = ""
    cwd: Annotated[
        PathText, Meta(description="the runner's working folder; unset: the folder of this file", examples=["~/models"])
    ] = ""
    stop_signal: Annotated[SignalName, Meta(description='a SIG name; "": the engine\'s own')] = ""
    health: Annotated[
        HealthPath | None,
        Meta(description='path that tells readiness, or "none"; unset: the engine\'s own', examples=["/health"]),
    ] = None
    check_listener: Annotated[bool, Meta(description="refuse an answer that comes from a process of somebody else")] = (
        True
    )
    options: msgspec.Struct


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration; `source` names the file it was read from, or `built in`."""

    server: Annotated[ServerSettings, Meta(description="the HTTP API")] = ServerSettings()
    scheduler: Annotated[SchedulerSettings, Meta(description="what holds for all models")] = SchedulerSettings()
    devices: Annotated[
        dict[str, PositiveSize], Meta(description="how much of a device models may have, by its name; unset: all of it")
    ] = {}
    models: Annotated[dict[str, ModelSettings], Meta(description="the models, by name")] = {}
    source: str = BUILT_IN

    def resolve(self, name: str) -> ModelSettings:
        """Return the model of that name or alias.

        Raises:
            ModelNotFound: there is none; details hold the `known` names and the closest one as `suggestion`.
        """
        if name in self.models:
            return self.models[name]
        for model in self.models.values():
            if name in model.aliases:
                return model
        raise self._not_found(name)

    def _not_found(self, name: str) -> ModelNotFound:
        known = sorted({*self.models, *(alias for model in self.models.values() for alias in model.aliases)})
        name = name[:_SHOWN]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {close[0]}?" if close else f"; known: {', '.join(known)}" if known else ""
        details: dict[str, object] = {"model": name, "known": known}
        if close:
            details["suggestion"] = close[0]
        return ModelNotFound(f"no model is named {name!r}{hint}", details=details)
