"""What routes ask for, as annotated aliases: services, actors by role, raw bodies, ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Path, Query, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from pydantic import BaseModel, StringConstraints, ValidationError
from starlette.concurrency import run_in_threadpool

from configs.errors import SpecError, to_pointer
from configs.load import parse_text
from configs.model import without_tags
from orchestrator.schemas import ProblemError, Role
from orchestrator.services.auth import Actor, KnownTokens, check_worker_secret, require
from orchestrator.services.problems import Invalid, field_error
from orchestrator.services.streams import StreamLimit
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore


@dataclass(frozen=True)
class Services:
    """What the API works with."""

    settings: Settings
    db: Database
    store: ObjectStore
    streams: StreamLimit
    tokens: KnownTokens = field(default_factory=KnownTokens)


def services_of(request: Request) -> Services:
    """The services that `create_app` was given."""
    services: Services = request.app.state.services
    return services


# What needs no database is async: a plain function would be sent to a thread and back, which takes longer than it does.
async def _services(request: Request) -> Services:
    return services_of(request)


ServicesDep = Annotated[Services, Depends(_services)]


class _Bearer(SecurityBase):
    """Who may call a route, and how OpenAPI says so. The header itself is read as it came, so that every mistake gets
    our own answer. Each is one dependency, not a chain of them: FastAPI takes as long for one as we do for the look."""

    def __init__(self, scheme_name: str, description: str) -> None:
        self.scheme_name = scheme_name
        self.model = HTTPBearer(description=description)


class _AtLeast(_Bearer):
    """The actor whose token the request holds, if its role is at least this one. Raises Unauthorized, Forbidden."""

    def __init__(self, role: Role) -> None:
        super().__init__("token", "A token made with POST /v1/tokens.")
        self._role = role

    async def __call__(self, request: Request) -> Actor:
        services = services_of(request)
        header = request.headers.get("authorization")
        actor = services.tokens.find(header)
        if actor is None:
            actor = await run_in_threadpool(services.tokens.authenticate, services.db, header, datetime.now(UTC))
        return require(actor, self._role)


class _Driver(_Bearer):
    """Lets drivers in. Raises Unauthorized."""

    def __init__(self) -> None:
        super().__init__("worker_secret", "Drivers only.")

    async def __call__(self, request: Request) -> None:
        services = services_of(request)
        check_worker_secret(services.settings, request.headers.get("authorization"))


Viewer = Annotated[Actor, Depends(_AtLeast("viewer"))]
Member = Annotated[Actor, Depends(_AtLeast("member"))]
Admin = Annotated[Actor, Depends(_AtLeast("admin"))]
DriverOnly = Depends(_Driver())


async def _raw_body(request: Request) -> bytes:
    return await request.body()


RawBody = Annotated[bytes, Depends(_raw_body)]

_Model = TypeVar("_Model", bound=BaseModel)


def json_body(model: type[_Model]) -> Callable[[bytes], _Model]:
    """A dependency that reads the body as `model`: duplicate keys, deep nesting and NaN are refused here too.

    Raises (when called):
        Invalid: with a pointer for every field that is wrong.
    """

    def parse(body: RawBody) -> _Model:
        try:
            return model.model_validate(parse_text(body))
        except ValidationError as error:
            raise Invalid("The body is not valid: see errors.", errors=_field_errors(error)) from None
        except SpecError as error:
            errors = [field_error(e.pointer, e.message, e.value, e.allowed) for e in error.errors]
            raise Invalid("The body is not valid: see errors.", errors=errors) from None

    return parse


def wire_body(model: type[_Model]) -> Callable[[bytes], _Model]:
    """A dependency that reads the body as a wire model of ours, fast: it may hold thousands of points.

    Raises (when called):
        Invalid: with a pointer for every field that is wrong.
    """

    def parse(body: RawBody) -> _Model:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise Invalid("The body is not valid: see errors.", errors=_field_errors(error)[:100]) from None

    return parse


def _field_errors(error: ValidationError) -> list[ProblemError]:
    return [
        field_error(to_pointer(without_tags(e["loc"])), e["msg"], e.get("input"))
        for e in error.errors(include_url=False, include_context=False)
    ]


def body_schema(
    model: type[BaseModel], *, yaml: bool = False, examples: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """OpenAPI of a body that the route reads itself."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    types = {"application/json": content}
    if yaml:
        types["application/yaml"] = {"schema": {"type": "string", "description": "A job file, as it is."}}
    return {"requestBody": {"required": True, "content": types}}


PrintableText = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
JobId = Annotated[str, Path(description="job_…")]
CheckpointId = Annotated[str, Path(description="ckpt_…")]
Limit = Annotated[int, Query(ge=1, le=200, description="Items on a page.")]
Cursor = Annotated[str | None, Query(max_length=4096, description="next_cursor of the page before.")]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$", description="Makes a repeated request safe."),
]
