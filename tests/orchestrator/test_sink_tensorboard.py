"""Event files, read back as TensorBoard reads a folder: in the order of names, checksums looked at, steps purged."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete
from starlette.testclient import TestClient
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from configs.layout import event_file_key, tensorboard_prefix
from configs.states import JobState
from orchestrator.cli.main import run
from orchestrator.control.sinks.deliver import Deliverer
from orchestrator.control.sinks.tensorboard import TensorBoardSink
from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore, S3Store
from orchestrator.storage.tables import EventRow, SinkCursorRow
from tests.factories import NOW
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.reported import ReportedJob, loss
from tests.orchestrator.test_metric_files import over

LATER = NOW + timedelta(hours=2)


def records_of(data: bytes) -> Iterator[Event]:
    """The records of an event file; both checksums of each must be right (computed by another implementation)."""

    def masked(piece: bytes) -> int:
        crc = crc32c(piece)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    while data:
        (length,), (length_crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        assert length_crc == masked(data[:8])
        body, (body_crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert len(body) == length
        assert body_crc == masked(body)
        yield Event.FromString(body)
        data = data[16 + length :]


def files_of(store: ObjectStore, job: ReportedJob) -> list[str]:
    return sorted(item.key for item in store.list(tensorboard_prefix(job.id)))


def events_of(store: ObjectStore, job: ReportedJob) -> list[Event]:
    return [event for key in files_of(store, job) for event in records_of(store.get(key))]


def shown(store: ObjectStore, job: ReportedJob) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a session's start, but not the first one, drops what lies at its step and beyond
    (plugin_event_accumulator.py)."""
    series: dict[str, list[tuple[int, float]]] = {}
    started = False
    for key in files_of(store, job):
        first, *events = records_of(store.get(key))
        assert first.file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                if started:
                    series = {tag: [p for p in points if p[0] < event.step] for tag, points in series.items()}
                started = True
            for value in event.summary.value:
                if not value.metadata.plugin_data.plugin_name:
                    series.setdefault(value.tag, []).append((event.step, value.simple_value))
    return series


def deliverer(db: Database, store: ObjectStore, seal_bytes: int = 1024 * 1024, page: int = 40_000) -> Deliverer:
    return Deliverer(db, TensorBoardSink(store, 0.0, seal_bytes), page)


@pytest.mark.db
def test_a_file_grows_and_never_changes_what_was_read(db: Database) -> None:
    job, store = ReportedJob(db), MemoryStore()
    before = b""
    for step in (1, 2, 3):
        job.losses(step)
        deliverer(db, store).look(NOW)
        (key,) = files_of(store, job)
        assert store.get(key).startswith(before)
        assert len(store.get(key)) > len(before)
        before = store.get(key)
    assert key == event_file_key(job.id, 1, 0)
    assert shown(store, job) == {
        "train/loss": [(step, loss(step, 1)) for step in (1, 2, 3)],
        "train/lr": [(step, 2.0**-step) for step in (1, 2, 3)],
    }
    times = [e.wall_time for e in events_of(store, job) if e.summary.value and e.step]
    assert times == [(NOW + timedelta(minutes=1, seconds=step)).timestamp() for step in (1, 2, 3)]


@pytest.mark.db
def test_repeated_steps_are_shown_once(db: Database) -> None:
    job, store = ReportedJob(db), MemoryStore()
    job.losses(1, 2, 3, 4)
    deliverer(db, store).look(NOW)
    job.begin(2)
    job.begin(1)  # one that never measured anything
    job.begin(3)
    job.losses(4, 5)
    deliverer(db, store).look(NOW)
    assert files_of(store, job) == [event_file_key(job.id, 1, 0), event_file_key(job.id, 4, 0)]
    assert shown(store, job)["train/loss"] == [(1, loss(1, 1)), (4, loss(4, 4)), (5, loss(5, 4))]


def test_values_that_are_not_finite_or_too_large(db: Database) -> None:
    job, store = ReportedJob(db), MemoryStore()
    job.report({("a", 1): None, ("b", 1): 1e300, ("c", 1): -1e300})
    deliverer(db, store).look(NOW)
    found = {tag: points[0][1] for tag, points in shown(store, job).items()}
    assert math.isnan(found["a"])
    assert (found["b"], found["c"]) == (math.inf, -math.inf)


def test_parameters_and_the_end_are_there_for_the_table_of_hyperparameters(db: Database) -> None:
    job, store = ReportedJob(db), MemoryStore()
    job.losses(1)
    deliverer(db, store).look(NOW)
    job.end(JobState.FAILED)
    deliverer(db, store).look(NOW)
    plugin = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events_of(store, job)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    given = plugin["_hparams_/session_start_info"].session_start_info.hparams
    assert given["optim.lr"].number_value == 3e-4
    assert given["optim.betas"].string_value == "[0.9, 0.999]"
    assert given["model.variant"].string_value == "Ti/4"
    assert "model.gelu" not in given
    assert plugin["_hparams_/session_end_info"].session_end_info.status == 2  # STATUS_FAILURE


@pytest.mark.db
@pytest.mark.parametrize("seal_bytes", [1, 400, 10**6])
@pytest.mark.parametrize("page", [4, 40_000])
def test_files_do_not_depend_on_when_they_were_written_or_cut_off(db: Database, seal_bytes: int, page: int) -> None:
    """One controller writes all in pieces and dies after each of them before it notes it; the other one at once."""
    job, pieces, whole = ReportedJob(db), MemoryStore(), MemoryStore()
    for steps, from_step in (((1, 2, 3), None), ((4, 5, 6), None), ((3, 4), 2), ((5, 6, 7), None)):
        if from_step is not None:
            job.begin(from_step)
        job.losses(*steps[:-1])
        with db.reader() as session:
            before = session.get(SinkCursorRow, (job.id, "tensorboard"))
        deliverer(db, pieces, seal_bytes, page).look(NOW)
        job.losses(steps[-1])
        _put_back(db, job, before)
        deliverer(db, pieces, seal_bytes, page).look(NOW)
    job.end()
    deliverer(db, pieces, seal_bytes, page).look(NOW)
    _put_back(db, job, None)
    deliverer(db, whole, seal_bytes).look(NOW)
    assert shown(pieces, job) == shown(whole, job)
    steps_shown = [step for step, _ in shown(whole, job)["train/loss"]]
    assert steps_shown == [1, 2, 3, 4, 5, 6, 7]
    assert (len(files_of(whole, job)) > 2) == (seal_bytes < 10**6)


def _put_back(db: Database, job: ReportedJob, before: SinkCursorRow | None) -> None:
    """Put the cursor where it was, as if the process had died before it moved it."""
    with db.session() as session:
        if before is None:
            session.execute(delete(SinkCursorRow).where(SinkCursorRow.job_id == job.id))
        else:
            session.merge(before)


def test_a_file_that_was_deleted_is_not_needed(db: Database) -> None:
    job, store = ReportedJob(db), MemoryStore()
    job.losses(1)
    deliverer(db, store).look(NOW)
    store.delete(files_of(store, job))
    job.losses(2)
    deliverer(db, store).look(NOW)
    assert shown(store, job)["train/loss"] == [(2, loss(2, 1))]


def test_a_store_that_is_away_or_loses_the_reply(db: Database) -> None:
    job, store = ReportedJob(db), MemoryStore()
    job.losses(1)
    store.fail_next = 1
    deliverer(db, store).look(NOW)
    assert files_of(store, job) == []
    store.lose_next_reply = True
    deliverer(db, store).look(NOW)
    job.losses(2)
    deliverer(db, store).look(NOW)
    assert [step for step, _ in shown(store, job)["train/loss"]] == [1, 2]
    with db.reader() as session:
        told = session.query(EventRow).where(EventRow.job_id == job.id, EventRow.type == "metrics.delayed").all()
    assert len(told) == 1


# -- the way to users --------------------------------------------------------------------------------------------------
def test_files_are_listed_and_read_through_the_api(api: TestClient, db: Database, store: MemoryStore) -> None:
    job = ReportedJob(db)
    path = f"/v1/jobs/{job.id}/tensorboard"
    assert api.get(path).json() == {"items": []}
    job.losses(1)
    deliverer(db, store).look(NOW)
    (file,) = api.get(path).json()["items"]
    assert file["name"] == "events.out.tfevents.0001.000000"
    response = api.get(f"{path}/{file['name']}")
    assert response.content == store.get(event_file_key(job.id, 1, 0))
    assert int(response.headers["content-length"]) == file["num_bytes"] == len(response.content)
    for missing in (f"{path}/no-such-file", f"{path}/..%2F..%2Freport.json", "/v1/jobs/job_x/tensorboard"):
        assert api.get(missing).status_code == 404


def test_the_command_brings_a_folder_up_to_date(
    api: TestClient, db: Database, store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ReportedJob(db)
    command = ["metrics", job.id, "--tensorboard", str(tmp_path / "runs"), "--url", "http://patchwork.test"]
    assert run(command, over(api)) == 0
    assert not (tmp_path / "runs").exists()
    job.losses(1, 2, 3)
    deliverer(db, store, seal_bytes=1).look(NOW)
    folder = tmp_path / "runs" / job.id
    assert run(command, over(api)) == 0
    assert sorted(path.name for path in folder.iterdir()) == [key.rpartition("/")[2] for key in files_of(store, job)]
    capsys.readouterr()
    assert run(command, over(api)) == 0
    assert "0 B fetched" in capsys.readouterr().out
    job.losses(4)
    deliverer(db, store, seal_bytes=1).look(NOW)
    assert run(command, over(api)) == 0
    for key in files_of(store, job):
        assert (folder / key.rpartition("/")[2]).read_bytes() == store.get(key)
    assert run([*command[:2], "train/loss", *command[2:]], over(api)) == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreServer]:
    server = ObjectStoreServer(tmp_path_factory.mktemp("store"))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.mark.stack
def test_files_lie_in_a_real_object_store(db: Database, server: ObjectStoreServer) -> None:
    job = ReportedJob(db)
    store = S3Store(
        endpoint=server.endpoint,
        region=server.region,
        bucket=server.bucket,
        prefix="events/",
        access_key=server.access_key,
        secret_key=server.secret_key,
    )
    store.create_bucket()
    for step in (1, 2, 3):
        job.losses(step)
        deliverer(db, store, seal_bytes=250).look(NOW)
    assert len(files_of(store, job)) == 2
    assert shown(store, job)["train/loss"] == [(step, loss(step, 1)) for step in (1, 2, 3)]
