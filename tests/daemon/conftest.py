"""What the daemon changes in its process, put back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog
import uvloop


@pytest.fixture(scope="session", autouse=True)
def first_uvloop() -> None:
    """Make one: libuv opens a pipe with its first loop and keeps it for good."""
    uvloop.new_event_loop().close()


@pytest.fixture
def log_as_before() -> Iterator[None]:
    """Put logging and structlog back as they were."""
    root, ours, server = (logging.getLogger(name) for name in (None, "mlxsup", "aiohttp.server"))
    handlers, levels, filters = list(root.handlers), (root.level, ours.level), list(server.filters)
    yield
    server.filters[:] = filters
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
