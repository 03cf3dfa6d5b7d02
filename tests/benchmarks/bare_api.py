"""What `api` is compared with: the least that FastAPI can do with the same statements, on the same kind of database and
server. No token, no validation, no idempotency, no order of states: a body comes in, rows go in, a body goes out.

    python -c 'from tests.benchmarks.bare_api import main; main()' <database url> <port>
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from sqlalchemy import Row, insert, select
from starlette.concurrency import run_in_threadpool

from configs.ids import new_job_id
from configs.wire import MetricColumns
from orchestrator.api.http import BoundedHttp
from orchestrator.storage.db import Database
from orchestrator.storage.points import upsert_points
from orchestrator.storage.tables import AttemptRow, EventRow, JobRow

JOBS, ATTEMPTS, EVENTS = JobRow.__table__, AttemptRow.__table__, EventRow.__table__


def bare_app(db: Database) -> FastAPI:
    """Routes that insert and select, and nothing else. New jobs are copies of one that is there."""
    app = FastAPI(openapi_url=None)
    with db.reader() as session:
        template = dict(session.execute(select(JOBS).limit(1)).one()._mapping)

    @app.post("/jobs", status_code=201)
    def create(body: dict[str, Any]) -> Response:
        row = template | {"id": new_job_id(), "submitted": body, "created_at": datetime.now(UTC)}
        with db.session() as session:
            session.execute(insert(JOBS), [row])
            event = {"job_id": row["id"], "type": "job.queued", "message": "", "actor": "", "data": {}}
            session.execute(insert(EVENTS), [event | {"at": row["created_at"]}])
        return _json(row)

    @app.get("/jobs/{job_id}")
    def get(job_id: str) -> Response:
        with db.reader() as session:
            job = session.execute(select(JOBS).where(JOBS.c.id == job_id)).one()
            attempts = session.execute(select(ATTEMPTS).where(ATTEMPTS.c.job_id == job_id)).all()
        return _json(_plain(job) | {"attempts": [_plain(attempt) for attempt in attempts]})

    @app.get("/jobs")
    def list_all(limit: int) -> Response:
        with db.reader() as session:
            jobs = session.execute(select(JOBS).order_by(JOBS.c.created_at.desc()).limit(limit)).all()
        return _json([_plain(job) for job in jobs])

    @app.post("/points/{job_id}")
    async def points(job_id: str, request: Request) -> Response:
        return _json(await run_in_threadpool(_store, db, job_id, await request.body()))

    return app


def _store(db: Database, job_id: str, body: bytes) -> dict[str, int]:
    batch = json.loads(body)
    columns = [MetricColumns.model_construct(**column) for column in batch["columns"]]
    with db.session() as session:
        upsert_points(session, job_id, 1, batch["seq"], columns)
    return {"seq": batch["seq"]}


def _plain(row: Row[Any]) -> dict[str, Any]:
    return dict(row._mapping)


def _json(value: Any) -> Response:
    return Response(json.dumps(value, default=_text), media_type="application/json")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def main() -> None:
    """Serve until killed, with the settings of our own server."""
    url, port = sys.argv[1], int(sys.argv[2])
    app = bare_app(Database(url))
    uvicorn.run(app, host="127.0.0.1", port=port, http=BoundedHttp, access_log=False, log_config=None)
