"""Runs that W&B's package leaves offline, read back from its transaction log."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete
from wandb.proto.wandb_internal_pb2 import Record

from configs.states import JobState
from orchestrator.control.sinks.deliver import Deliverer
from orchestrator.control.sinks.sink import SinkUnavailable
from orchestrator.control.sinks.wandb import WandbSink
from orchestrator.storage.db import Database
from orchestrator.storage.tables import SinkCursorRow, SinkRow
from tests.factories import NOW
from tests.orchestrator.reported import ReportedJob, loss

LATER = NOW + timedelta(hours=2)
_BLOCK = 32 * 1024


def records_of(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format (blocks; fragments of a record carry first, middle, last)
    behind a header of seven bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    offset, held = 7, b""
    while offset < len(data):
        if _BLOCK - offset % _BLOCK < 7:
            offset += _BLOCK - offset % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        held += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield Record.FromString(held)
            held = b""


class Runs:
    """What lies in `folder`, in the order in which `wandb sync` takes it: the folders of a run by name."""

    def __init__(self, folder: Path) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}
        self.x_axes: dict[str, str] = {}
        for path in sorted(folder.glob("*/*/wandb/offline-run-*/run-*.wandb")):
            run_id = path.parents[3].name
            for record in records_of(path):
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    assert record.run.run_id == run_id
                    self.configs[run_id] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                elif kind == "history":
                    row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                    self.rows.setdefault(run_id, []).append(row)
                elif kind == "exit":
                    self.exit_codes[run_id] = record.exit.exit_code
                elif kind == "metric" and record.metric.step_metric:
                    self.x_axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def make_sink(folder: Path) -> WandbSink:
    return WandbSink("vit", "", "offline", folder, 0.0, "https://patchwork.example")


def test_a_job_is_a_run_that_goes_on(db: Database, tmp_path: Path) -> None:
    job = ReportedJob(db, name="first try", labels={"team": "vision"})
    job.losses(1, 2)
    Deliverer(db, make_sink(tmp_path)).look(NOW)
    job.report({("train/loss", 3): None})
    job.end(JobState.FAILED)
    Deliverer(db, make_sink(tmp_path)).look(NOW)
    runs = Runs(tmp_path)
    rows = runs.rows[job.id]
    assert losses(rows[:2]) == [(1, loss(1, 1)), (2, loss(2, 1))]
    assert rows[1]["train/lr"] == 0.25
    assert rows[1]["_timestamp"] == (NOW + timedelta(minutes=1, seconds=2)).timestamp()
    assert math.isnan(float(rows[2]["train/loss"]))
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert runs.configs[job.id]["optim"] == {"lr": 3e-4, "betas": [0.9, 0.999]}
    assert runs.configs[job.id]["patchwork"]["url"] == f"https://patchwork.example/v1/jobs/{job.id}"
    assert runs.exit_codes[job.id] == 1
    assert runs.x_axes["*"] == "step"


def test_a_controller_that_dies_before_it_notes_what_it_wrote_repeats_nothing(db: Database, tmp_path: Path) -> None:
    job = ReportedJob(db)
    job.losses(1, 2)
    Deliverer(db, make_sink(tmp_path)).look(NOW)
    with db.session() as session:
        session.execute(delete(SinkCursorRow))
    job.losses(3)
    Deliverer(db, make_sink(tmp_path)).look(NOW)
    assert losses(Runs(tmp_path).rows[job.id]) == [(step, loss(step, 1)) for step in (1, 2, 3)]


def test_rolled_back_steps_are_left_behind_in_a_run_of_their_own(db: Database, tmp_path: Path) -> None:
    job = ReportedJob(db)
    job.losses(1, 2, 3, 4)
    Deliverer(db, make_sink(tmp_path)).look(NOW)
    job.begin(2)
    job.losses(3)
    job.end()
    Deliverer(db, make_sink(tmp_path)).look(NOW)
    runs = Runs(tmp_path)
    assert losses(runs.rows[f"{job.id}-1"]) == [(1, loss(1, 1)), (2, loss(2, 1)), (3, loss(3, 2))]
    assert runs.exit_codes[f"{job.id}-1"] == 0
    assert len(runs.rows[job.id]) == 4


def test_a_folder_that_cannot_be_written_is_named(db: Database, tmp_path: Path) -> None:
    job = ReportedJob(db)
    job.losses(1)
    (tmp_path / "file").write_text("")
    Deliverer(db, make_sink(tmp_path / "file")).look(NOW)
    with db.reader() as session:
        row = session.get_one(SinkRow, "wandb")
    assert not row.ok
    assert row.message.startswith("wandb_dir: ")
    assert str(tmp_path / "file") in row.message


def test_online_needs_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SinkUnavailable, match="WANDB_API_KEY is not set"):
        WandbSink("vit", "", "online", None, 0.0).prepare()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    sink = WandbSink("vit", "", "online", None, 0.0)
    sink.prepare()
    assert sink.secrets == ("k" * 40,)


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SinkUnavailable, match=r"pip install 'patchwork-vit\[sinks\]'"):
        make_sink(tmp_path).prepare()
