"""Metrics as files: every point that counts, once, in pieces; on a client's side as files and frames."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import pyarrow.parquet
import pytest
from starlette.testclient import TestClient

from orchestrator.cli.main import run
from orchestrator.cli.options import Wiring
from orchestrator.client import Client, Unreachable
from orchestrator.schemas import MetricSeries, MetricsPublic
from orchestrator.services import metric_files
from orchestrator.storage.db import Database
from tests.orchestrator.rows import T0, add_attempt, submit
from tests.orchestrator.test_api_metrics import add_points


@pytest.fixture
def job_id(api: TestClient, db: Database) -> str:
    """A job that resumed from step 20, with points on both sides of it."""
    made = str(submit(api)["id"])
    add_attempt(db, made, 1)
    add_attempt(db, made, 2, from_step=20)
    add_points(db, made, 1, {10: 1.0, 20: 0.1 + 0.2, 30: 3.0})
    add_points(db, made, 2, {20: 2.5, 30: None})
    add_points(db, made, 1, {20: 0.5, 30: 0.6}, "eval/top1")
    return made


EXPECTED = [
    ("eval/top1", 20, 0.5, 1),
    ("train/loss", 10, 1.0, 1),
    ("train/loss", 20, 2.5, 2),
    ("train/loss", 30, None, 2),
]


def rows_of(text: str) -> list[tuple[str, int, float | None, int]]:
    found = list(csv.DictReader(io.StringIO(text)))
    return [
        (row["name"], int(row["step"]), float(row["value"]) if row["value"] else None, int(row["attempt"]))
        for row in found
    ]


@pytest.mark.db
def test_csv_holds_every_point_that_counts(api: TestClient, job_id: str) -> None:
    response = api.get(f"/v1/jobs/{job_id}/metrics?format=csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert response.headers["content-disposition"] == f'attachment; filename="{job_id}-metrics.csv"'
    assert rows_of(response.text) == EXPECTED
    assert response.text.splitlines()[1] == f"eval/top1,20,0.5,1,{T0.isoformat()}"


def test_csv_values_come_back_exactly(api: TestClient, db: Database) -> None:
    made = str(submit(api)["id"])
    add_attempt(db, made)
    values: dict[int, float | None] = {1: 0.1 + 0.2, 2: 1e-300, 3: -12345678.9, 4: 5e-324, 5: 1.7976931348623157e308}
    add_points(db, made, 1, values)
    found = rows_of(api.get(f"/v1/jobs/{made}/metrics?format=csv").text)
    assert {step: value for _, step, value, _ in found} == values


@pytest.mark.db
def test_parquet_holds_the_same(api: TestClient, job_id: str) -> None:
    response = api.get(f"/v1/jobs/{job_id}/metrics?format=parquet")
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    table = pyarrow.parquet.read_table(io.BytesIO(response.content))
    assert [(r["name"], r["step"], r["value"], r["attempt"]) for r in table.to_pylist()] == EXPECTED
    assert table["at"].to_pylist() == [T0] * 4
    assert table.schema.metadata[b"patchwork.job_id"] == job_id.encode()


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_job_without_metrics_gives_an_empty_table(api: TestClient, format: str) -> None:
    content = api.get(f"/v1/jobs/{submit(api)['id']}/metrics?format={format}").content
    if format == "csv":
        assert content == b"name,step,value,attempt,at\n"
    else:
        assert pyarrow.parquet.read_table(io.BytesIO(content)).num_rows == 0


@pytest.mark.db
def test_pages_join_without_loss_or_repetition(api: TestClient, db: Database) -> None:
    """Pages of three rows: a step's two attempts fall on both sides of a border."""
    made = str(submit(api)["id"])
    add_attempt(db, made, 1)
    add_attempt(db, made, 2, from_step=15)
    add_points(db, made, 1, {step: float(step) for step in range(1, 20)})
    add_points(db, made, 2, {step: -float(step) for step in range(5, 31)})
    expected = [(step, float(step) if step < 5 else -float(step)) for step in range(1, 31)]
    text = b"".join(metric_files.metrics_file(db, made, [], "csv", page_size=3)).decode()
    assert [(step, value) for _, step, value, _ in rows_of(text)] == expected
    content = b"".join(metric_files.metrics_file(db, made, [], "parquet", page_size=3, row_group_size=4))
    file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
    assert [(r["step"], r["value"]) for r in file.read().to_pylist()] == expected
    assert file.num_row_groups == 8


@pytest.mark.db
def test_no_transaction_stays_open_and_later_attempts_stay_out(api: TestClient, db: Database) -> None:
    """A slow reader: between two pieces the job restarts; the file stays what it was when it was asked for."""
    made = str(submit(api)["id"])
    add_attempt(db, made, 1)
    add_points(db, made, 1, dict.fromkeys(range(1, 10_001), 1.0))
    pieces = metric_files.metrics_file(db, made, [], "csv")
    first = b"".join(islice(pieces, 2))
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    add_attempt(db, made, 2, from_step=0)
    add_points(db, made, 2, dict.fromkeys(range(1, 10_001), 2.0))
    found = rows_of((first + b"".join(pieces)).decode())
    assert len(found) == 10_000
    assert {attempt for _, _, _, attempt in found} == {1}


def test_names_choose_and_unknown_ones_are_refused(api: TestClient, job_id: str) -> None:
    text = api.get(f"/v1/jobs/{job_id}/metrics?format=csv&names=eval/top1").text
    assert {name for name, *_ in rows_of(text)} == {"eval/top1"}
    refused = api.get(f"/v1/jobs/{job_id}/metrics?format=csv&names=eval/top1,train/los")
    assert refused.status_code == 422
    (error,) = refused.json()["errors"]
    assert (error["pointer"], error["value"], error["allowed"]) == ("/names", "train/los", "eval/top1, train/loss")


def test_max_points_does_not_apply_to_files(api: TestClient, job_id: str) -> None:
    refused = api.get(f"/v1/jobs/{job_id}/metrics?format=csv&max_points=10")
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/max_points"


def test_a_server_without_pyarrow_says_so(api: TestClient, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused = api.get(f"/v1/jobs/{job_id}/metrics?format=parquet")
    assert refused.status_code == 406
    assert refused.json()["code"] == "not_acceptable"
    assert "pyarrow" in refused.json()["detail"]
    assert api.get(f"/v1/jobs/{job_id}/metrics?format=csv").status_code == 200


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_an_unknown_job_is_404(api: TestClient, format: str) -> None:
    path = f"/v1/jobs/job_01ARZ3NDEKTSV4RRFFQ69G5FAV/metrics?format={format}"
    assert api.get(path).status_code == 404


# -- the client's side -------------------------------------------------------------------------------------------------
class Cut(httpx.SyncByteStream):
    """A body that breaks after its first piece."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"name,step"
        raise httpx.ReadError("connection reset")


JOB = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"


def test_a_download_is_tried_again_until_bytes_came() -> None:
    answers = iter([httpx.Response(503), httpx.Response(200, content=b"name,step\n")])
    client = Client("http://patchwork.test", "t", transport=httpx.MockTransport(lambda _: next(answers)))
    out = io.BytesIO()
    assert client.jobs.write_metrics(JOB, out) == 10
    assert out.getvalue() == b"name,step\n"


def test_a_download_that_was_cut_is_an_error() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Cut()))
    with pytest.raises(Unreachable, match="cut off after 9 bytes"):
        Client("http://patchwork.test", "t", transport=transport).jobs.write_metrics(JOB, io.BytesIO())


def over(api: TestClient) -> Wiring:
    """The command line on the tests' API."""

    def handle(request: httpx.Request) -> httpx.Response:
        answer = api.request(request.method, request.url.raw_path.decode())
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    return Wiring(httpx.MockTransport(handle))


def test_the_command_writes_files(api: TestClient, job_id: str, tmp_path: Path) -> None:
    server = ("--url", "http://patchwork.test", "--token", "t")
    for option in ("--csv", "--parquet"):
        assert run(["metrics", job_id, "train/loss", option, str(tmp_path / f"x{option}"), *server], over(api)) == 0
    assert rows_of((tmp_path / "x--csv").read_text()) == EXPECTED[1:]
    assert pyarrow.parquet.read_table(tmp_path / "x--parquet").num_rows == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "x"))) == ["x--csv", "x--parquet"]


def test_a_refused_file_is_not_made(api: TestClient, job_id: str, tmp_path: Path) -> None:
    arguments = ["metrics", job_id, "no/such", "--csv", str(tmp_path / "x.csv"), "--url", "http://patchwork.test"]
    assert run(arguments, over(api)) == 2
    assert not [p for p in tmp_path.iterdir() if "x.csv" in p.name]


def test_the_command_takes_one_form_at_a_time(tmp_path: Path) -> None:
    assert run(["metrics", JOB, "--json", "--csv", str(tmp_path / "x.csv"), "--url", "http://patchwork.test"]) == 2


CURVES = MetricsPublic(
    job_id=JOB,
    names=("a", "b"),
    series=(
        MetricSeries(
            name="a",
            steps=(1, 2),
            values=(0.5, None),
            lows=(0.25, None),
            highs=(1.0, None),
            attempts=(1, 1),
            num_points=2,
        ),
        MetricSeries(name="b", steps=(2,), values=(3.0,), lows=(3.0,), highs=(3.0,), attempts=(2,), num_points=1),
    ),
)


def test_curves_become_a_frame() -> None:
    frame = CURVES.to_pandas()
    assert list(frame.columns) == ["name", "step", "value", "low", "high", "attempt"]
    assert frame["name"].tolist() == ["a", "a", "b"]
    wide = frame.pivot(index="step", columns="name", values="value")
    assert wide.loc[2, "b"] == 3.0
    assert frame["value"].isna().tolist() == [False, True, False]
    assert len(MetricsPublic(job_id=JOB, names=(), series=()).to_pandas()) == 0


def test_a_frame_without_pandas_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        CURVES.to_pandas()
