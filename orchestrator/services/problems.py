"""Errors the API answers with, as application/problem+json (RFC 9457). Services raise them; routes never catch them.

    ApiError                    status  code
    ├── Unauthorized            401     unauthorized
    ├── Forbidden               403     forbidden
    ├── NotFound                404     not_found
    ├── Conflict                409     conflict
    │   ├── WrongState          409     wrong_state             says the job's state and what is allowed in it
    │   ├── KeyReused           409     idempotency_key_reused
    │   └── Fenced              409     attempt_fenced          this attempt may not speak for the job any more
    ├── NotAcceptable           406     not_acceptable          this server cannot write the format
    ├── PreconditionFailed      412     precondition_failed
    ├── TooLarge                413     body_too_large
    ├── RangeNotSatisfiable     416     range_not_satisfiable
    ├── Invalid                 422     invalid                 with errors[].pointer
    ├── TooManyStreams          429     too_many_streams
    └── Unavailable             503     unavailable

Errors of other layers have a handler of their own: SpecError (configs) is 422 spec_invalid; a database or an object
store that does not answer is 503; anything else is 500 and says nothing of our insides.
"""

from __future__ import annotations

import http
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from configs.load import SpecError
from configs.model import without_tags
from orchestrator.schemas import Problem, ProblemError
from orchestrator.storage.db import is_unavailable
from orchestrator.storage.store import StoreError

log = structlog.get_logger(__name__)
PROBLEM_JSON = "application/problem+json"
_LONGEST_VALUE = 300


class ApiError(Exception):
    """An answer that is not a success. Knows its status, its code and what to do next."""

    status = 500
    code = "internal"

    def __init__(
        self,
        detail: str,
        *,
        hint: str | None = None,
        errors: Sequence[ProblemError] = (),
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.errors = tuple(errors)
        self.headers = dict(headers or {})
        self.members = members


class Unauthorized(ApiError):
    status, code = 401, "unauthorized"

    def __init__(self, detail: str) -> None:
        super().__init__(
            detail,
            hint="Send a valid token: Authorization: Bearer pw_…",
            headers={"WWW-Authenticate": 'Bearer realm="patchwork"'},
        )


class Forbidden(ApiError):
    status, code = 403, "forbidden"


class NotFound(ApiError):
    status, code = 404, "not_found"


class NotAcceptable(ApiError):
    status, code = 406, "not_acceptable"


class Conflict(ApiError):
    status, code = 409, "conflict"


class WrongState(Conflict):
    code = "wrong_state"


class KeyReused(Conflict):
    code = "idempotency_key_reused"


class Fenced(Conflict):
    code = "attempt_fenced"


class PreconditionFailed(ApiError):
    status, code = 412, "precondition_failed"


class TooLarge(ApiError):
    status, code = 413, "body_too_large"


class RangeNotSatisfiable(ApiError):
    status, code = 416, "range_not_satisfiable"


class Invalid(ApiError):
    status, code = 422, "invalid"


class TooManyStreams(ApiError):
    status, code = 429, "too_many_streams"


class Unavailable(ApiError):
    status, code = 503, "unavailable"


def field_error(pointer: str, message: str, value: Any = None, allowed: str | None = None) -> ProblemError:
    """One entry of errors[]; long values are cut and values JSON cannot hold are spelled out."""
    return ProblemError(pointer=pointer, message=message, value=_shown(value), allowed=allowed)


def problem_response(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    hint: str | None = None,
    errors: Sequence[ProblemError] = (),
    headers: Mapping[str, str] | None = None,
    members: Mapping[str, Any] | None = None,
) -> Response:
    """The error as application/problem+json."""
    problem = Problem(
        type=f"urn:patchwork:problem:{code}",
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.url.path,
        code=code,
        errors=tuple(errors),
        hint=hint,
        **(members or {}),
    )
    # ensure_ascii: user text may hold lone surrogates, which UTF-8 cannot.
    body = json.dumps(problem.model_dump(mode="python"), ensure_ascii=True, allow_nan=False, default=str)
    return Response(body, status_code=status, media_type=PROBLEM_JSON, headers=dict(headers or {}))


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)[:_LONGEST_VALUE]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _on_api_error(request: Request, error: ApiError) -> Response:
    return problem_response(
        request,
        error.status,
        error.code,
        error.detail,
        hint=error.hint,
        errors=error.errors,
        headers=error.headers,
        members=error.members,
    )


def _on_spec_error(request: Request, error: SpecError) -> Response:
    errors = [field_error(e.pointer, e.message, e.value, e.allowed) for e in error.errors]
    first = f"{errors[0].pointer or 'the job description'}: {errors[0].message}" if errors else str(error)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return problem_response(
        request,
        422,
        "spec_invalid",
        f"The job description is not valid. {first}{more}",
        hint="Correct the fields named in errors and send it again; nothing was stored.",
        errors=errors,
    )


def _on_request_error(request: Request, error: RequestValidationError) -> Response:
    errors = [
        field_error(
            "/" + "/".join(str(part) for part in without_tags(e["loc"][1:])),
            f"{e['loc'][0]}: {e['msg']}",
            e.get("input"),
        )
        for e in error.errors()
    ]
    return problem_response(request, 422, "invalid", "The request is not valid: see errors.", errors=errors)


def _on_http_error(request: Request, error: HTTPException) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "http_error")
    return problem_response(
        request, error.status_code, code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers
    )


def _on_database_error(request: Request, error: Exception) -> Response:
    if not is_unavailable(error):
        return _on_unexpected(request, error)
    log.error("database_unavailable", path=request.url.path, error=str(error))
    return problem_response(
        request,
        503,
        "database_unavailable",
        "The database does not answer; nothing was changed.",
        hint="Try again; with an Idempotency-Key a repeated submission is safe.",
        headers={"Retry-After": "2"},
    )


def _on_store_error(request: Request, error: StoreError) -> Response:
    log.error("store_unavailable", path=request.url.path, error=str(error))
    return problem_response(
        request,
        503,
        "store_unavailable",
        "The object store does not answer as it should.",
        hint="Try again; /readyz says which part is away.",
        headers={"Retry-After": "2"},
    )


def _on_unexpected(request: Request, error: Exception) -> Response:
    log.error("unexpected_error", path=request.url.path, exc_info=error)
    return problem_response(
        request,
        500,
        "internal",
        "This is a fault of Patchwork; the server's log says more.",
        hint="Please report it with the time and the address of this request.",
    )


def install_handlers(app: FastAPI) -> None:
    """Make every error of `app` an application/problem+json answer."""
    app.add_exception_handler(ApiError, _on_api_error)  # type: ignore[arg-type]
    app.add_exception_handler(SpecError, _on_spec_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _on_request_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(SQLAlchemyError, _on_database_error)
    app.add_exception_handler(StoreError, _on_store_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_unexpected)


_DESCRIPTIONS = {
    401: "No token, or not a valid one.",
    403: "The token's role does not allow this.",
    404: "There is no such thing.",
    406: "This server cannot write that format.",
    409: "The state does not allow this.",
    412: "If-Match names another version.",
    413: "The body is larger than allowed.",
    416: "The range lies outside the file.",
    422: "The request is not valid; errors[].pointer names each field.",
    429: "Too many streams are open for this token.",
    503: "A part the API needs does not answer.",
}


def declares(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for a route that may answer with these problems."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _DESCRIPTIONS[status], "content": content} for status in statuses}
