"""How each kind of runner is launched and spoken to; `ENGINES` is the list of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from mlxsup.engines.base import Address, Engine, Finding, Launch, Verdict
from mlxsup.engines.command import CommandEngine
from mlxsup.engines.imagegen import ImagegenEngine

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {engine.kind: engine for engine in (ImagegenEngine(), CommandEngine())}
)
"""Every engine by its kind, as `engine = "..."` in the configuration names it."""

KEYS: Mapping[str, type[msgspec.Struct]] = MappingProxyType({kind: engine.keys for kind, engine in ENGINES.items()})
"""The configuration keys each engine adds to the common ones."""

__all__ = ["ENGINES", "KEYS", "Address", "Engine", "Finding", "Launch", "Verdict"]
