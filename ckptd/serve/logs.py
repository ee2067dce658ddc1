"""How the daemon logs: one line an event on standard error, as text for people or as JSON for machines."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(level: str, *, is_json: bool) -> None:
    """Log events of ``level`` (debug, info, warning, error) and worse."""
    rendered: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    if is_json:
        rendered = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *rendered,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
