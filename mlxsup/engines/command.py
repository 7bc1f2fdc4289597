"""The `command` engine: any program that speaks the NDJSON wire, started by an argument list, never through a shell."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from mlxsup.config import ModelSettings
from mlxsup.config.rules import home_path, placed
from mlxsup.engines import wire
from mlxsup.engines.base import Address, Engine, Finding, Launch, Transport
from mlxsup.errors import EngineUnavailable
from mlxsup.protocol import RunnerMemory

_PLACEHOLDER = re.compile(r"\{(port|socket|path|model|python|ready_fd)\}")


class CommandKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `engine = "command"`."""

    command: Annotated[
        list[str],
        msgspec.Meta(
            min_length=1,
            description="program and arguments; {port}, {socket}, {path}, {model}, {python}, {ready_fd} are filled in",
            examples=[["./server", "--port", "{port}", "--model", "{path}"]],
        ),
    ]
    dialect: Annotated[
        Literal["completion"], msgspec.Meta(description="what it speaks: completion (the NDJSON wire)")
    ] = "completion"


class CommandEngine(Engine):
    """Starts what the user says. It listens on a unix socket if the command names {socket}, else on {port}."""

    kind: ClassVar[str] = "command"
    keys: ClassVar[type[msgspec.Struct]] = CommandKeys

    def check(self, model: ModelSettings) -> None:
        """Refuse a program that is not there."""
        program = self._program(model)
        if shutil.which(program, path=model.env.get("PATH")) is None:
            found = "/" in program and Path(program).exists()
            why = "is not executable" if found else "is not there" if "/" in program else "is not on PATH"
            mend = f"chmod +x {program}" if found else f"correct models.{model.name}.command"
            raise EngineUnavailable(
                f"{program} {why}; mend: {mend}",
                details={"permanent": True, "model": model.name, "cause": "missing_file"},
            )

    def transport(self, model: ModelSettings) -> Transport:
        """Unix when the command can be told a socket."""
        return "unix" if any("{socket}" in part for part in _keys(model).command) else "tcp"

    def launch(self, model: ModelSettings, address: Address) -> Launch:
        """Fill the placeholders in; each argument stays one argument."""
        program = self._program(model)
        arguments = (self._fill(part, model, address) for part in _keys(model).command[1:])
        return Launch(argv=(shutil.which(program, path=model.env.get("PATH")) or program, *arguments))

    def read_health(self, status: int, body: bytes) -> Finding:
        """Read health as the wire has it."""
        return wire.read_health(status, body)

    def read_memory(self, body: bytes) -> RunnerMemory | None:
        """Read memory as the wire has it."""
        return wire.read_memory(body)

    def _program(self, model: ModelSettings) -> str:
        """A name on PATH, or a path. Its symlinks stay: a virtual environment is known by the link its Python is started by."""
        program = self._fill(_keys(model).command[0], model, Address())
        return placed(home_path(program), model.cwd) if "/" in program else program

    @staticmethod
    def _fill(part: str, model: ModelSettings, address: Address) -> str:
        values = {
            "port": str(address.port),
            "socket": address.socket,
            "path": model.path,
            "model": model.name,
            "python": model.python or sys.executable,
            "ready_fd": Launch.READY_FD,
        }
        return _PLACEHOLDER.sub(lambda match: values[match[1]], part)


def _keys(model: ModelSettings) -> CommandKeys:
    assert isinstance(model.options, CommandKeys)  # config joined the keys by the engine's kind
    return model.options
