"""Keep other libraries' chatter (warnings, logs, progress bars, prints) off the user's terminal."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_LIBRARIES = ("diffusers", "transformers", "optimum", "huggingface_hub", "torch", "onnxruntime")


class _Recorder(logging.Handler):
    """Collects what is logged as warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Silence Python-level output of the libraries inside the block, their imports included.

    Yields:
        The list that logged warnings are collected in. Exceptions pass through untouched.
    """
    recorder = _Recorder()
    sink = io.StringIO()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [recorder]
        logger.propagate = False
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield recorder.messages
    finally:
        for logger, handlers, propagate in before:
            # A library that is imported in the block binds a handler to the sink: give it the real stderr.
            added = [handler for handler in logger.handlers if handler not in (recorder, *handlers)]
            for handler in added:
                if isinstance(handler, logging.StreamHandler) and handler.stream is sink:
                    handler.__dict__.pop("flush", None)  # the libraries set it to the stream's own
                    handler.setStream(sys.stderr)
            logger.handlers[:] = [*handlers, *added]
            logger.propagate = propagate if not added else logger.propagate
