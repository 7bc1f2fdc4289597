"""`mlxsup runner`: this process becomes a runner. The supervisor starts it; a person may, to look at one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxsup.cli.failures import not_installed
from mlxsup.errors import InvalidRequest


def runner(
    *,
    model: str,
    imagegen_engine: Annotated[bool, Parameter(negative="")] = False,
    port: int | None = None,
    socket: Path | None = None,
    ready_fd: int | None = None,
    max_pixels: int | None = None,
    quantize: int | None = None,
    lora: Annotated[list[str] | None, Parameter(negative="")] = None,
    lora_scale: Annotated[list[float] | None, Parameter(negative="")] = None,
) -> int:
    """Serve one model over HTTP until SIGINT or SIGTERM.

    Args:
        model: builtin:emoji, a pipeline's folder, or ORG/NAME of the Hugging Face cache.
        imagegen_engine: Make pictures with MLX; the one kind of runner there is.
        port: Listen on this port of 127.0.0.1.
        socket: Listen on this unix socket.
        ready_fd: Write one byte to this descriptor when ready.
        max_pixels: Refuse pictures of more than this, as width x height.
        quantize: Quantise the weights to 3, 4, 5, 6 or 8 bits.
        lora: Add a LoRA; may be given several times.
        lora_scale: How strongly, one for each LoRA.
    """
    if not imagegen_engine:
        raise InvalidRequest("say which kind of runner: --imagegen-engine")
    if (port is None) == (socket is None):
        raise InvalidRequest("give either --port or --socket")
    try:
        from mlxsup.imagegen import server
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    try:
        return server.main(
            model=model,
            host="127.0.0.1",
            port=port,
            socket=str(socket) if socket else None,
            ready_fd=ready_fd,
            max_pixels=max_pixels,
            quantize=quantize,
            lora_paths=lora or (),
            lora_scales=lora_scale or (),
        )
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
