"""Every way a call to mlxsup can fail: one class a way, with its wire code, HTTP status and what to do next.

The class is what a library caller catches, `code` is what an HTTP body carries, and both come from this one table. Nothing
here knows of processes or sockets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from mlxsup.shortages import describe_shortage

Source = Literal["mlxsup", "runner"]


class MlxsupError(Exception):
    """The base of all errors that mlxsup raises on purpose.

    Attributes:
        code: the stable name of this way of failing, as HTTP bodies carry it.
        status: the HTTP status that goes with it.
        message: one line for a person, with the mending step where there is one.
        retry_after: seconds after which another try makes sense, or None when it does not.
        details: facts for programs (all JSON-able), such as `last_words`, `exit_code`, `signal`, `stage`, `model`.
        source: who failed: "mlxsup" itself or the "runner" it asked.
    """

    code: ClassVar[str] = "internal"
    default_status: ClassVar[int] = 500
    source: ClassVar[Source] = "mlxsup"
    default_retry_after: ClassVar[float | None] = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status if status is not None else self.default_status
        self.retry_after = self.default_retry_after if retry_after is None else retry_after
        self.details: dict[str, Any] = dict(details or {})

    def again(self) -> MlxsupError:
        """Return a fresh copy, for another waiter: one exception object must not collect two tracebacks."""
        return type(self)(self.message, status=self.status, retry_after=self.retry_after, details=self.details)


class ConfigError(MlxsupError):
    """The configuration cannot be used; `problems` lists every fault found, each with its path."""

    code = "config_error"

    @property
    def problems(self) -> list[str]:
        """Each fault as one line, `models.flux.keep_alve: unknown key, did you mean keep_alive?`."""
        found = self.details.get("problems", [self.message])
        return [str(problem) for problem in found]


class InvalidRequest(MlxsupError):
    """The request itself is wrong: bad JSON, a bad value, a missing field."""

    code = "invalid_request"
    default_status = 400


class UnsupportedParameter(InvalidRequest):
    """A well-formed field that this engine cannot honour."""

    code = "unsupported_parameter"


class Unauthorized(MlxsupError):
    """No key, or one that is not known."""

    code = "unauthorized"
    default_status = 401


class Forbidden(MlxsupError):
    """Whoever asks may not: a web page of an origin, or by a name, that is not allowed."""

    code = "forbidden"
    default_status = 403


class ModelNotFound(MlxsupError):
    """No model of that name is configured."""

    code = "model_not_found"
    default_status = 404


class Conflict(MlxsupError):
    """What is asked contradicts the present state, such as a second daemon on one address."""

    code = "conflict"
    default_status = 409


class BodyTooLarge(MlxsupError):
    """The request body is larger than `server.max_body`."""

    code = "body_too_large"
    default_status = 413


class NotSupported(MlxsupError):
    """The engine has no such ability, for example embeddings from an image runner."""

    code = "not_supported"
    default_status = 501


class RunnerError(MlxsupError):
    """The runner answered with an error of its own; `status` is the runner's."""

    code = "runner_error"
    default_status = 502
    source = "runner"


class RunnerDied(MlxsupError):
    """The runner's process ended while it was needed; details carry exit and last words."""

    code = "runner_died"
    default_status = 502
    source = "runner"


class BadAnswer(MlxsupError):
    """The runner lives but its answer is no answer: cut off, not JSON, or without the result it promised."""

    code = "bad_answer"
    default_status = 502
    source = "runner"


class QueueFull(MlxsupError):
    """Too many requests wait already."""

    code = "queue_full"
    default_status = 503
    default_retry_after = 1.0


class Loading(MlxsupError):
    """The model is still being loaded and the caller did not want to wait."""

    code = "loading"
    default_status = 503
    default_retry_after = 1.0


class Unloaded(MlxsupError):
    """The model was unloaded by force, or drained past its deadline, while this request used or awaited it."""

    code = "unloaded"
    default_status = 503
    default_retry_after = 1.0


class Backoff(MlxsupError):
    """The runner failed a moment ago and is not started again yet; carries the cached cause."""

    code = "backoff"
    default_status = 503
    default_retry_after = 1.0


class ShuttingDown(MlxsupError):
    """The supervisor is closing and takes no new work."""

    code = "shutting_down"
    default_status = 503
    default_retry_after = 5.0


class ResourceExhausted(MlxsupError):
    """This program or its machine is out of descriptors, processes or memory for them: no fault of a runner, and it may pass."""

    code = "resource_exhausted"
    default_status = 503
    default_retry_after = 1.0

    @classmethod
    def of(cls, what: str, error: BaseException, **details: Any) -> Self:
        """Make the error for what could not be done, as in `cannot start m`, because of a shortage."""
        return cls(f"{what}: {describe_shortage(error)}", details={"errno": getattr(error, "errno", None), **details})


class LoadTimeout(MlxsupError):
    """The runner showed no progress for `load_timeout`, or its model's files hung for as long (`stage` is "weighing")."""

    code = "load_timeout"
    default_status = 504


class Stalled(MlxsupError):
    """The runner lives but sent nothing for the silence limit."""

    code = "stalled"
    default_status = 504


class DeadlineExceeded(MlxsupError):
    """The request's own deadline passed, or its model's `queue_timeout`; `stage` in the details tells where it stood."""

    code = "deadline"
    default_status = 504


class DoesNotFit(MlxsupError):
    """The model needs more memory than its device has; a retry helps where `retry_after` says when."""

    code = "does_not_fit"
    default_status = 507


class LoadFailed(MlxsupError):
    """The runner could not be brought up; `permanent` tells whether another try could help."""

    code = "load_failed"
    default_status = 500
    source: ClassVar[Source] = "runner"

    @property
    def permanent(self) -> bool:
        """True when nothing will change without a person: a bad path, a missing library or binary."""
        return bool(self.details.get("permanent", False))


class EngineUnavailable(LoadFailed):
    """This machine cannot run the engine at all; found before anything is spawned."""

    source = "mlxsup"


def _every(kind: type[MlxsupError]) -> Iterator[type[MlxsupError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _every(below)


BY_CODE: Mapping[str, type[MlxsupError]] = {kind.code: kind for kind in reversed(list(_every(MlxsupError)))}
"""The class of each wire code; of several with one code, the most general."""
