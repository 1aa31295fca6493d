"""Requests that schemathesis makes of the OpenAPI document: no server error, and no answer that isn't declared."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from excise.serve.http_app import create_app
from tests.serve.fake_engine import FakeEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
        unsupported_method,
    )

APP = create_app(FakeEngine())
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@SCHEMA.exclude(path_regex="ready").parametrize()  # type: ignore[untyped-decorator]
@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_every_route(case: Any) -> None:
    strict = [negative_data_rejection] if case.path == "/v1/images/generations" else []
    case.call_and_validate(checks=[*CHECKS, *strict])
