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
    parser.add_argument("--model", required=True, help="builtin:emoji")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="TCP port on 127.0.0.1; 0 takes a free one")
    where.add_argument("--socket", help="path of a unix socket")
    parser.add_argument("--ready-fd", type=int, help="inherited descriptor that gets one byte when the model is loaded")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    sys.exit(main(given.model, port=given.port, socket=given.socket, ready_fd=given.ready_fd))
