"""mlxsup: an asyncio-native supervisor for local model runners.

    from mlxsup import Supervisor

    async with Supervisor() as sup:
        async with sup.completion("emoji", prompt="a red heart") as chunks:
            async for chunk in chunks:
                ...

The names below load on first use, so that `import mlxsup` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxsup._version import __version__

if TYPE_CHECKING:
    from mlxsup.completion import Completion
    from mlxsup.config import Settings
    from mlxsup.errors import MlxsupError
    from mlxsup.leases import Lease
    from mlxsup.protocol import CompletionChunk, CompletionRequest, Options
    from mlxsup.report import Event, RunnerReport, Status
    from mlxsup.supervisor import Supervisor

_HOMES = {
    "Completion": "mlxsup.completion",
    "CompletionChunk": "mlxsup.protocol",
    "CompletionRequest": "mlxsup.protocol",
    "Event": "mlxsup.report",
    "Lease": "mlxsup.leases",
    "MlxsupError": "mlxsup.errors",
    "Options": "mlxsup.protocol",
    "RunnerReport": "mlxsup.report",
    "Settings": "mlxsup.config",
    "Status": "mlxsup.report",
    "Supervisor": "mlxsup.supervisor",
}

__all__ = [
    "Completion",
    "CompletionChunk",
    "CompletionRequest",
    "Event",
    "Lease",
    "MlxsupError",
    "Options",
    "RunnerReport",
    "Settings",
    "Status",
    "Supervisor",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
