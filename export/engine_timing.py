"""The file that TensorRT keeps the measured times of kernels in, so that a second build is quicker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from excise.errors import OutputError, UsageError
from excise.export.engine_library import EngineLibrary
from excise.output import PARTIAL


@contextmanager
def timing_cache(config: Any, path: Path | None, library: EngineLibrary) -> Iterator[None]:
    """Let the builds of ``config`` in the block use the timing cache ``path``, and replace it in one step after them.

    The file is left alone where the block raises.

    Raises:
        UsageError: ``path`` is there and isn't a timing cache of this library.
        OutputError: It can't be written.
    """
    if path is None:
        yield
        return
    with library.listening() as heard:
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or any("deserialize timing cache" in message for message in heard.warnings):
            raise UsageError(f"{path} isn't a timing cache of {library.name} {library.version}: name another file")
        config.set_timing_cache(cache, False)
    yield
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
