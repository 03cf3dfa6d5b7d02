"""Tokens, and who one is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from orchestrator.api.deps import Admin, ServicesDep, Viewer, body_schema, json_body
from orchestrator.api.examples import TOKEN
from orchestrator.schemas import TokenCreate, TokenCreated, TokenPage, Whoami
from orchestrator.services import tokens
from orchestrator.services.problems import declares

router = APIRouter(prefix="/v1", tags=["tokens"])


@router.get("/whoami", operation_id="whoami", responses=declares(401, 503))
def whoami(actor: Viewer) -> Whoami:
    """The name and role of the token that was sent."""
    return Whoami(name=actor.name, role=actor.role, token_id=actor.token_id)


@router.get("/tokens", operation_id="list_tokens", responses=declares(401, 403, 503))
def list_tokens(services: ServicesDep, _: Admin) -> TokenPage:
    """Every token, without its secret."""
    return tokens.list_tokens(services.db)


@router.post(
    "/tokens",
    status_code=201,
    operation_id="create_token",
    openapi_extra=body_schema(TokenCreate, examples={"ci": TOKEN}),
    responses=declares(401, 403, 413, 422, 503),
)
def create_token(
    services: ServicesDep,
    actor: Admin,
    response: Response,
    request: Annotated[TokenCreate, Depends(json_body(TokenCreate))],
) -> TokenCreated:
    """Make a token. The answer holds the only copy of its secret."""
    response.headers["Cache-Control"] = "no-store"
    return tokens.create_token(services.db, actor, request)


@router.delete(
    "/tokens/{token_id}", status_code=204, operation_id="revoke_token", responses=declares(401, 403, 404, 409, 503)
)
def revoke_token(services: ServicesDep, _: Admin, token_id: str) -> None:
    """Make a token useless from now on."""
    tokens.revoke_token(services.db, token_id)
    services.tokens.forget()
