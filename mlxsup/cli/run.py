"""`mlxsup run`: one prompt, one picture or text, from whoever does the work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxsup.cli import interrupts
from mlxsup.cli.options import Config, Json, Url
from mlxsup.cli.pictures import PictureFile
from mlxsup.cli.progress import Display, display
from mlxsup.cli.target import Wish, for_work
from mlxsup.protocol import CompletionRequest


def run(
    model: str,
    prompt: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    json: Json = False,
    local: Annotated[bool, Parameter(negative="")] = False,
    url: Url = "",
    config: Config = None,
) -> int:
    """Ask a model for a picture or a text.

    Uses the daemon that --url or $MLXSUP_URL names, else one that runs at the configured address, else loads the model in a
    process of its own for as long as the work takes.

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
        json: Print each chunk of the answer as a line of JSON; pictures go to the file all the same.
        local: Do not ask a daemon.
        url: The daemon to ask.
        config: Configuration file, instead of the one that is searched for.
    """
    request = CompletionRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        width=width,
        height=height,
        steps=steps,
        seed=seed,
    ).with_seed()
    picture = PictureFile.at(output, f"{model}-{request.seed}")
    logging.getLogger("mlxsup").addHandler(logging.NullHandler())  # a failure is one line, and that is ours to write
    wish = Wish(url=url, config=config, local=local)
    return interrupts.run(_run(wish, model, request, display(model, picture, as_json=json)))


async def _run(wish: Wish, model: str, request: CompletionRequest, shown: Display) -> int:
    async with for_work(wish) as target:
        with shown:
            async with target.completion(model, request) as work:
                await work.start()
                async for chunk in work:
                    shown.show(chunk)
    return 0
