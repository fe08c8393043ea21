"""Requests made from the OpenAPI description, valid and not: no answer is a server's fault."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from served import ENGINE, serving, write_model

import flexcore as fc


def test_no_server_errors(tmp_path_factory: pytest.TempPathFactory) -> None:
    llm = fc.LLM(write_model(tmp_path_factory.mktemp("model")), **ENGINE)
    with serving(llm, tmp_path_factory.mktemp("data"), max_waiting=256) as served:
        schema = schemathesis.openapi.from_url(served.url + "/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) > 20
        for operation in operations:
            attack(operation, served.url)
            assert served.state.runner.error is None
        assert httpx.get(served.url + "/health").status_code == 200


def attack(operation: Any, url: str) -> None:
    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        answer = case.call(base_url=url, timeout=60)
        assert answer.status_code < 500, (operation.label, answer.status_code, answer.text, case.body)

    check()
