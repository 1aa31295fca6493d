"""Triton's own schema of a model configuration, from the package tritonclient, where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from pathlib import Path
from typing import Any


@cache
def schema() -> Any:
    """The message class ``ModelConfig``; None if tritonclient or protobuf isn't installed.

    Only the generated file is loaded: the package around it needs grpc.
    """
    found = importlib.util.find_spec("tritonclient")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("excise_triton_model_config_pb2", file)
    if spec is None or spec.loader is None or not file.is_file():
        return None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # generated for the major version before, which protobuf promises to read
        try:
            spec.loader.exec_module(module)
        except Exception:  # protobuf's errors for a generated file that is too old share no base class
            return None
    return module.ModelConfig


def schema_problem(text: str) -> str | None:
    """Why a ``config.pbtxt`` isn't one by the schema, on one line; None if it is, or no schema is here."""
    model_config = schema()
    if model_config is None:
        return None
    text_format: Any = importlib.import_module("google.protobuf.text_format")
    try:
        text_format.Parse(text, model_config())
    except text_format.ParseError as error:
        return " ".join(str(error).split())
    return None
