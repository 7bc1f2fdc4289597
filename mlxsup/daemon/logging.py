"""Sets up the log of the daemon: lines for people on a terminal, JSON elsewhere, always on stderr, which may be slow.

The library logs through the standard `logging` with its facts in `extra`; here they become structlog events.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Final

import orjson
import structlog
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from mlxsup.daemon.lines import LineHandler

STDERR: Final = 2


def configure(descriptor: int = STDERR) -> None:
    """Route every logger, structlog's and the standard ones, to a descriptor; mlxsup's from info, others from warning.

    What a slow reader has not taken yet is written at the end of the program, within some seconds.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = LineHandler(descriptor)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(terminal=os.isatty(descriptor)),
            ],
        )
    )
    root = logging.getLogger()
    closed = descriptor == STDERR and sys.stderr is None  # it may be the number of something else by now
    root.handlers[:] = [logging.NullHandler() if closed else handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("mlxsup").setLevel(logging.INFO)
    logging.getLogger("aiohttp.server").addFilter(_without_bad_requests)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _without_bad_requests(record: logging.LogRecord) -> bool:
    """Drop tracebacks of HTTP that is none: whoever scans our port must not fill the log."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, RequestPayloadError))


def _renderers(*, terminal: bool) -> list[structlog.typing.Processor]:
    if terminal:
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_dumps)]


def _dumps(event: object, **_: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
