"""`mlxsup run`: one prompt, one picture or text, from whoever does the work."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter
from msgspec.structs import replace

from mlxsup import terms
from mlxsup.cli import interrupts
from mlxsup.cli.options import Config, Json, KeepAlive, Text, Url
from mlxsup.cli.pictures import PictureFile, chosen_format, read_picture
from mlxsup.cli.progress import Display, display
from mlxsup.cli.target import Wish, Work, for_work, makes_pictures
from mlxsup.errors import MlxsupError
from mlxsup.protocol import CompletionRequest, OutputFormat

_USUAL_PREVIEWS: Final = 3
"""Asked for where they can be seen and nobody said how many."""


def run(
    model: Text,
    prompt: Text,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    guidance: float | None = None,
    negative_prompt: Text = "",
    image: Annotated[list[Path] | None, Parameter(consume_multiple=False, negative="")] = None,
    strength: float | None = None,
    previews: int | None = None,
    output_format: Annotated[OutputFormat | None, Parameter(name="--format")] = None,
    output_compression: Annotated[int | None, Parameter(name="--compression")] = None,
    no_metadata: Annotated[bool, Parameter(negative="")] = False,
    keep_alive: KeepAlive = None,
    json: Json = False,
    local: Annotated[bool, Parameter(negative="")] = False,
    url: Url = "",
    config: Config = None,
) -> int:
    """Ask a model for a picture or a text.

    Uses the daemon that --url or $MLXSUP_URL names, else one that runs at the configured address, else loads the model in a
    process of its own for as long as the work takes. A terminal that can show pictures shows them, unless --previews is 0 or
    $NO_COLOR is set.

    Args:
        model: A model of the configuration; without one, there is `emoji`.
        prompt: What is asked for.
        output: Where the picture goes; MODEL-SEED.png unless set.
        width: Pixels; the model's own size unless set.
        height: Pixels; the model's own size unless set.
        steps: How many steps to draw in.
        seed: The same seed gives the same picture; chosen and told unless set.
        guidance: How closely to follow the prompt.
        negative_prompt: What not to draw.
        image: A picture to start from; may be given several times.
        strength: How far to go from it: 0 leaves it as it is, 1 leaves nothing of it.
        previews: How many pictures of the work in progress to ask for; a few unless set, where the terminal can show them.
        output_format: Of the picture file; as the name of the output says, else png.
        output_compression: Quality of a jpeg or webp file, 0 to 100.
        no_metadata: Leave prompt, seed and settings out of the picture file.
        keep_alive: How long the daemon keeps the model after its last use.
        json: Print each chunk of the answer as a line of JSON; the picture goes to its file all the same.
        local: Do not ask a daemon.
        url: The daemon to ask.
        config: Configuration file, instead of the one that is searched for.
    """
    kept = terms.keep_alive(keep_alive, "--keep-alive")
    kind = chosen_format(output, output_format)
    request = CompletionRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        width=width,
        height=height,
        steps=steps,
        seed=seed,
        strength=strength,
        previews=previews or None,
        output_format=kind,
        output_compression=output_compression,
        metadata=False if no_metadata else None,
    ).with_seed()
    request.check()
    request = replace(request, images=[read_picture(path) for path in image or ()])
    picture = PictureFile.at(output, f"{model}-{request.seed}", kind)
    logging.getLogger("mlxsup").addHandler(logging.NullHandler())  # a failure is one line, and that is ours to write
    wish = Wish(url=url, config=config, local=local)
    shown = display(model, picture, as_json=json, draws=previews != 0)
    return interrupts.run(_run(wish, model, request, kept, shown, hopes=shown.draws and previews is None))


async def _run(
    wish: Wish, model: str, request: CompletionRequest, keep_alive: float | None, shown: Display, *, hopes: bool
) -> int:
    async with for_work(wish) as target:
        hopes = hopes and await makes_pictures(target, model)
        ask = functools.partial(target.completion, model, keep_alive=keep_alive)
        with shown:
            async with contextlib.AsyncExitStack() as stack:
                work = await _started(stack, ask, request, hopes=hopes)
                async for chunk in work:
                    shown.show(chunk)
    return 0


async def _started(
    stack: contextlib.AsyncExitStack,
    ask: Callable[[CompletionRequest], Work],
    request: CompletionRequest,
    *,
    hopes: bool,
) -> Work:
    """Start the work; when it `hopes` for previews and they are refused, then without: nobody asked for them."""
    if hopes:
        try:
            return await _start(stack, ask(replace(request, previews=_USUAL_PREVIEWS)))
        except MlxsupError as error:
            if not (400 <= error.status < 500 and "previews" in error.message):
                raise
    return await _start(stack, ask(request))


async def _start(stack: contextlib.AsyncExitStack, work: Work) -> Work:
    await stack.enter_async_context(work)
    await work.start()
    return work
