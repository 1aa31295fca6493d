"""A detector's ONNX model, or a part of one, opened in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from excise.errors import ModelError, UsageError
from excise.serve.onnx_component import Provider, one_line, providers

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def open_session(
    source: Path, provider: Provider, model: bytes | None = None, *, threads: int | None = None
) -> InferenceSession:
    """A session of the file ``source``, or of ``model``, a part of it.

    Args:
        threads: cores for each call; None leaves it to ONNX Runtime, which takes all.

    Raises:
        ModelError: the model can't be loaded.
        UsageError: the provider can't be used.
    """
    import onnxruntime

    chain = providers(provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they come back as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        # its own fallback would print to stdout and go on with another provider
        session = onnxruntime.InferenceSession(model or str(source), options, providers=chain, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ModelError(f"{source} can't be loaded by ONNX Runtime: {one_line(error)}") from error
    if session.get_providers()[0] != chain[0]:
        raise UsageError(
            f"{chain[0]} can't start on this machine: check its driver and libraries, or take provider cpu"
        )
    return session
