"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from typing import Any

import flexcore

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a client is told; the status gives the type."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    return ApiError(404, f"No such {what}: {name!r}", param, f"{what.replace(' ', '_')}_not_found")


def of_engine(error: flexcore.Error) -> ApiError:
    """What the engine refused. Its messages begin with the argument: "temperature: got -1, wanted ..."."""
    text = str(error)
    if isinstance(error, flexcore.OutOfMemory):
        return ApiError(503, text, code="out_of_memory")
    if isinstance(error, flexcore.DeviceError):
        return ApiError(503, text, code="device_error")
    if isinstance(error, flexcore.InvalidArgument | flexcore.Unsupported | flexcore.ModelLoadError):
        named = re.match(r"(?:[\w.]+: )*?([a-z_][\w.\[\]]*): ", text)
        return ApiError(400, text, named[1] if named else None)
    return ApiError(500, text)
