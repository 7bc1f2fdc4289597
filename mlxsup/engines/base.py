"""What an engine is: how one kind of runner is checked, launched, asked for its health, and what it can do.

An engine holds no state and starts nothing; `mlxsup.runners` acts on what it answers here. A new engine is one file with one
subclass of Engine, listed in `mlxsup.engines`.
"""

from __future__ import annotations

import abc
import enum
import re
import signal
from collections.abc import Callable
from typing import ClassVar, Literal

import msgspec

from mlxsup import weights
from mlxsup.config import ModelSettings
from mlxsup.engines import environment
from mlxsup.errors import NotSupported, UnsupportedParameter
from mlxsup.protocol import CompletionRequest, RunnerMemory
from mlxsup.weights import Need, Weights

Transport = Literal["unix", "tcp"]
Ability = Literal["completion", "embedding", "tokenize", "detokenize"]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a runner listens: a unix socket, or a loopback port."""

    socket: str = ""
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def transport(self) -> Transport:
        """Which of the two this is."""
        return "unix" if self.socket else "tcp"

    @property
    def base_url(self) -> str:
        """The HTTP base; over a unix socket the host name is a formality."""
        return "http://localhost" if self.socket else f"http://{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket else f"{self.host}:{self.port}"


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How to start one runner.

    `READY_FD` among the arguments stands for the number of an inherited descriptor, on which a runner that knows of it
    writes one byte the moment it is ready.
    """

    READY_FD: ClassVar[str] = "{ready_fd}"

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    library_dirs: tuple[str, ...] = ()

    @property
    def wants_ready_fd(self) -> bool:
        """Whether the runner will report its readiness on an inherited pipe."""
        return any(self.READY_FD in part for part in self.argv)

    def arguments(self, ready_fd: int | None) -> list[str]:
        """Return the arguments with the descriptor's number filled in."""
        return [part.replace(self.READY_FD, str(ready_fd)) for part in self.argv]


class Verdict(enum.Enum):
    """What an answer of the health path means."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


class Finding(msgspec.Struct, frozen=True):
    """An engine's reading of one health answer; `progress` runs from 0 to 1, `detail` is for people."""

    verdict: Verdict
    progress: float | None = None
    detail: str = ""


class NoKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of an engine that has none of its own."""


class Engine(abc.ABC):
    """One kind of runner. Subclasses say how it is launched; the defaults here fit most HTTP servers."""

    kind: ClassVar[str]
    keys: ClassVar[type[msgspec.Struct]] = NoKeys
    abilities: ClassVar[frozenset[Ability]] = frozenset({"completion"})
    pictures: ClassVar[bool] = False
    """Whether every answer must end with a picture."""
    default_health: ClassVar[str] = "/health"
    default_concurrency: ClassVar[int] = 1
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    noise: ClassVar[re.Pattern[str] | None] = None
    """Lines of output that say nothing, such as access lines of our own probes; kept out of log and ring."""

    @abc.abstractmethod
    def check(self, model: ModelSettings) -> None:
        """Refuse before anything is spawned. May block for some milliseconds: it is called off the loop.

        Raises:
            EngineUnavailable: this machine cannot run the engine; the message has the mending command.
            LoadFailed: the model's path cannot be what this engine reads.
        """

    def need(self, model: ModelSettings, learnt: Callable[[Weights], int | None] | None = None) -> Need:
        """Return the memory that the model's runner will take. Reads headers of files: called off the loop.

        Args:
            model: whose.
            learnt: says what an earlier load of the same files took, if that is known.

        Raises:
            UnreadableModel: its files do not tell; the message names the one at fault.
        """
        if model.memory is not None:
            return weights.need(None, declared=int(model.memory))
        try:
            found = self.weigh(model)
        except weights.UnreadableModel as error:
            error.message += f"; or say what it needs: models.{model.name}.memory"
            raise
        known = learnt(found) if learnt is not None else None
        return weights.need(found, learnt=known, working_set=self.working_set(model, found))

    def weigh(self, model: ModelSettings) -> Weights:
        """Return what the headers of the model's files tell."""
        return weights.measure(
            model.path, ollama_store=environment.ollama_store(model), hf_cache=environment.hf_cache(model)
        )

    def working_set(self, model: ModelSettings, found: Weights) -> int:
        """Return the bytes that work takes beside the tensors: by the rule of thumb for text, unless an engine knows better."""
        del model
        return weights.text_working_set(found)

    @abc.abstractmethod
    def transport(self, model: ModelSettings) -> Transport:
        """Say where this model's runner can listen; unix is preferred wherever it works."""

    @abc.abstractmethod
    def launch(self, model: ModelSettings, address: Address) -> Launch:
        """Return the command that serves `model` on `address`. Called off the loop."""

    def read_health(self, status: int, body: bytes) -> Finding:
        """Say what an HTTP answer of the health path means: 200 is ready, everything else is not yet."""
        del body
        if status == 200:
            return Finding(Verdict.READY)
        return Finding(Verdict.LOADING, detail=f"health answered {status}")

    def read_memory(self, body: bytes) -> RunnerMemory | None:
        """Return what a runner says of its own memory on its health path, None where it says nothing."""
        del body
        return None

    def check_request(self, model: ModelSettings, request: CompletionRequest) -> None:
        """Refuse a request before a runner sees it.

        Raises:
            UnsupportedParameter: it has fields that this engine cannot honour.
            InvalidRequest: it asks for more than was reserved for the model.
        """
        del model
        if fields := self.unsupported(request):
            told = f"the {self.kind} engine cannot honour {', '.join(fields)}"
            raise UnsupportedParameter(told, details={"fields": fields, "param": fields[0]})

    def unsupported(self, request: CompletionRequest) -> list[str]:
        """Name the fields of `request` that this engine cannot honour."""
        del request
        return []

    def require(self, ability: Ability) -> None:
        """Refuse what this engine cannot do at all.

        Raises:
            NotSupported: `ability` is not among the engine's abilities.
        """
        if ability not in self.abilities:
            raise NotSupported(f"the {self.kind} engine does not support {ability}", details={"ability": ability})
