"""`python -m tests.runners.recording`: write anew what the image runner answers, byte for byte as it comes off the wire."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from mlxsup import Supervisor

FOLDER = Path(__file__).parent / "recorded"

_SMALL = {"prompt": "a red heart", "seed": 1, "steps": 2, "width": 64, "height": 64}
ASKED: dict[str, dict[str, Any]] = {
    "picture": {**_SMALL, "width": 96, "height": 96},
    "previews": {**_SMALL, "steps": 3, "previews": 2, "output_format": "webp", "metadata": False},
    "refusal": {**_SMALL, "steps": -1},
}


async def main() -> None:
    """Ask the model that ships for each of these, one after the other."""
    async with Supervisor() as sup, sup.lease("emoji") as lease:
        for name, fields in ASKED.items():
            said = await _ask(lease.socket, json.dumps(fields).encode())
            (FOLDER / f"{name}.http").write_bytes(said)


async def _ask(socket: str, body: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(socket)
    head = f"POST /completion HTTP/1.1\r\nHost: runner\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        return await reader.read()
    finally:
        writer.close()


if __name__ == "__main__":
    asyncio.run(main())
