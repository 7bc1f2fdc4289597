"""`python -m mlxsup.imagegen`: the runner with as few imports as possible, which is what a supervisor starts."""

from __future__ import annotations

import argparse
import sys

from mlxsup.imagegen.server import main


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mlxsup.imagegen", description="Serve one MLX image model on loopback."
    )
    parser.add_argument(
        "--imagegen-engine", action="store_true", required=True, help="the only kind of runner there is here"
    )
    parser.add_argument(
        "--model", required=True, help="builtin:emoji, a pipeline's folder, or ORG/NAME of the Hugging Face cache"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="TCP port on 127.0.0.1; 0 takes a free one")
    where.add_argument("--socket", help="path of a unix socket")
    parser.add_argument("--ready-fd", type=int, help="inherited descriptor that gets one byte when the model is loaded")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="width x height of the largest picture that is made"
    )
    parser.add_argument("--quantize", type=int, metavar="BITS", help="quantise the weights: 3, 4, 5, 6 or 8 bits")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE", help="add a LoRA; may be given several times"
    )
    parser.add_argument(
        "--lora-scale",
        action="append",
        default=[],
        type=float,
        metavar="SCALE",
        help="how strongly, one for each --lora",
    )
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    sys.exit(
        main(
            given.model,
            port=given.port,
            socket=given.socket,
            ready_fd=given.ready_fd,
            max_pixels=given.max_pixels,
            quantize=given.quantize,
            lora_paths=given.lora,
            lora_scales=given.lora_scale,
        )
    )
