"""What crosses the border between supervisor and runner: the request, the chunks of its answer, and health.

The wire is newline-delimited JSON over HTTP: `POST /completion` takes a CompletionRequest and answers with one
CompletionChunk a line, the last one with `done: true`; `GET /health` answers with a Health.
"""

from __future__ import annotations

import base64
import math
import secrets
from collections.abc import Iterator
from typing import Literal

import msgspec

from mlxsup.errors import BadAnswer, InvalidRequest

MAX_SEED = 2**53
"""Seeds are integers that every JSON reader keeps exact: 0 < seed < 2**53."""


MOST_PREVIEWS = 100

OutputFormat = Literal["png", "webp", "jpeg"]
"""Picture files that a runner can be asked for."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sampling options of text runners; None means the engine's default."""

    num_predict: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: list[str] | None = None


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One piece of work for a runner. None and empty mean "the engine's default".

    `width`, `height` are pixels, `images` raw picture files (base64 on the wire), `seed` is chosen when None or 0.
    `strength` says how far the result may go from `images` (0 to 1; at 1 nothing of them is left), `previews` how many
    pictures of the work in progress are wanted. `output_compression` runs from 0 to 100, as in OpenAI's images API: the
    quality of jpeg and webp. `metadata` False leaves prompt, seed and settings out of the picture file.
    """

    prompt: str
    negative_prompt: str = ""
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    images: list[bytes] = []
    strength: float | None = None
    previews: int | None = None
    output_format: OutputFormat | None = None
    output_compression: int | None = None
    metadata: bool | None = None
    options: Options | None = None

    def check(self) -> None:
        """Refuse what no engine could make sense of and JSON could not carry.

        Raises:
            InvalidRequest: a number that is not finite, a side or a number of steps below 1, a strength, a number of
                previews or a compression out of its range, a text that is not Unicode.
        """
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InvalidRequest(
                f"guidance must be a finite number, not {self.guidance}", details={"param": "guidance"}
            )
        for name, least, most in (("strength", 0, 1), ("previews", 0, MOST_PREVIEWS), ("output_compression", 0, 100)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InvalidRequest(f"{name} must be from {least} to {most}, not {value}", details={"param": name})
        for name in ("width", "height", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {value}", details={"param": name})
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"{name} is not valid Unicode: {error.reason}", details={"param": name}) from None

    def with_seed(self) -> CompletionRequest:
        """Return this request with a seed of its own.

        Raises:
            InvalidRequest: a seed outside 0..2**53-1.
        """
        if not self.seed:
            return msgspec.structs.replace(self, seed=1 + secrets.randbelow(MAX_SEED - 1))
        if not 0 < self.seed < MAX_SEED:
            raise InvalidRequest(f"seed must be between 0 and {MAX_SEED - 1} (0: choose one), not {self.seed}")
        return self

    def fields_in_use(self) -> Iterator[str]:
        """Name the fields beside `prompt` that differ from their defaults, options as `options.top_k`."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name == "options" and value is not None:
                yield from (f"options.{key}" for key in value.__struct_fields__ if getattr(value, key) is not None)
            elif name != "prompt" and value not in (None, "", []):
                yield name


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a runner's answer. Durations are nanoseconds, `image` is a base64 picture file ("" for none).

    With `preview` the picture is not the result but what it looks like at this step.
    """

    content: str = ""
    image: str = ""
    preview: bool = False
    seed: int | None = None
    done: bool = False
    step: int | None = None
    total: int | None = None
    stop_reason: str | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None

    def image_bytes(self) -> bytes:
        """Return the picture file's bytes.

        Raises:
            BadAnswer: the runner sent something that is not base64, or no picture at all.
        """
        if not self.image:
            raise BadAnswer("this chunk carries no picture")
        try:
            return base64.b64decode(self.image, validate=True)
        except ValueError as error:  # binascii.Error, or characters beyond ASCII
            raise BadAnswer(f"the runner's picture is not base64: {error}") from error


class RunnerMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner says of its own memory, in bytes."""

    active: int = 0
    peak: int = 0
    cache: int = 0


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `GET /health`; `progress` runs from 0 to 1 while loading."""

    status: str = ""
    progress: float | None = None
    pid: int | None = None
    model: str | None = None
    busy: bool | None = None
    memory: RunnerMemory | None = None
