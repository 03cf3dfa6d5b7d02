"""Metrics on their way to a sink: nothing is lost or told twice, whatever is cut off, and nobody waits for it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from configs.states import JobState
from orchestrator.control.sinks.deliver import LONGEST_PAUSE_S, Deliverer, forget_other_sinks, pause
from orchestrator.storage.db import Database
from orchestrator.storage.tables import EventRow, MetricRow, SinkCursorRow, SinkRow
from tests.factories import NOW
from tests.fakes.recording_sink import RecordingSink
from tests.orchestrator.reported import ReportedJob, loss

pytestmark = pytest.mark.db
LATER = NOW + timedelta(hours=2)


def losses_of(sink: RecordingSink, job: ReportedJob) -> dict[int, float | None]:
    return {step: value for (name, step), value in sink.points[job.id].items() if name == "train/loss"}


def cursor_of(db: Database, job: ReportedJob) -> SinkCursorRow:
    with db.reader() as session:
        return session.get_one(SinkCursorRow, (job.id, "recording"))


def events_of(db: Database, job: ReportedJob) -> list[tuple[str, str]]:
    with db.reader() as session:
        rows = session.scalars(select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.seq))
        return [(row.type, row.message) for row in rows if row.type.startswith("metrics.")]


def test_what_arrives_is_written_once_and_the_end_too(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.losses(1, 2)
    assert deliverer.look(NOW) == 1
    job.losses(3)
    job.report({("train/loss", 4): None})
    job.report()
    assert deliverer.look(NOW) == 1
    assert losses_of(sink, job) == {1: loss(1, 1), 2: loss(2, 1), 3: loss(3, 1), 4: None}
    assert [len(delivery.points) for delivery in sink.deliveries] == [4, 3]
    assert deliverer.look(NOW) == 0
    job.end(JobState.FAILED)
    deliverer.look(NOW)
    deliverer.look(NOW)
    assert sink.ends == {job.id: JobState.FAILED}
    assert len(sink.deliveries) == 3


def test_pages_join_without_loss_and_keep_reports_whole(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    job.losses(*range(1, 12))
    job.begin(11)
    job.losses(*range(12, 20))
    job.end()
    Deliverer(db, sink, page=5).look(NOW)
    assert losses_of(sink, job) == {step: loss(step, 1 if step < 12 else 2) for step in range(1, 20)}
    assert [len(delivery.points) for delivery in sink.deliveries] == [4] * 9 + [2]
    assert [delivery.final for delivery in sink.deliveries] == [False] * 9 + [True]


def test_points_of_slow_ranks_are_not_missed(db: Database) -> None:
    """Steps do not arrive in order: only the order of the reports counts."""
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.report({("perf/x/rank-00000", 10): 1.0})
    deliverer.look(NOW)
    job.report({("perf/x/rank-00001", 5): 2.0})
    deliverer.look(NOW)
    assert sink.points[job.id] == {("perf/x/rank-00000", 10): 1.0, ("perf/x/rank-00001", 5): 2.0}


def test_a_spool_that_comes_after_the_end_is_written_too(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.losses(1)
    job.end()
    deliverer.look(NOW)
    job.losses(2)
    deliverer.look(NOW)
    assert losses_of(sink, job) == {1: loss(1, 1), 2: loss(2, 1)}


def test_a_controller_that_dies_before_it_notes_what_it_wrote_repeats_it(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    job.losses(1, 2)
    sink.lose_reply = True
    Deliverer(db, sink).look(NOW)
    assert len(sink.deliveries) == 1
    job.losses(3)
    Deliverer(db, sink).look(NOW)
    first, second = sink.deliveries
    assert second.points[: len(first.points)] == first.points
    assert losses_of(sink, job) == {1: loss(1, 1), 2: loss(2, 1), 3: loss(3, 1)}


def test_two_controllers_move_a_cursor_once(db: Database) -> None:
    """The second one writes while the first one does: the cursor moves by the first, and nothing goes backwards."""
    job, inner = ReportedJob(db), RecordingSink()
    job.losses(1)

    class Overtaken(RecordingSink):
        def write(self, delivery):  # type: ignore[no-untyped-def]
            job.losses(2)
            Deliverer(db, inner).look(NOW)
            return super().write(delivery)

    Deliverer(db, Overtaken()).look(NOW)
    assert (cursor_of(db, job).attempt, cursor_of(db, job).seq) == (1, 2)
    assert losses_of(inner, job) == {1: loss(1, 1), 2: loss(2, 1)}


# -- lineage -----------------------------------------------------------------------------------------------------------
def test_steps_that_were_rolled_back_before_they_were_written_are_left_out(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    job.losses(1, 2, 3, 4)
    job.begin(2)
    job.losses(3)
    Deliverer(db, sink).look(NOW)
    assert losses_of(sink, job) == {1: loss(1, 1), 2: loss(2, 1), 3: loss(3, 2)}
    assert sink.deliveries[-1].generation == 0


def test_a_sink_that_holds_rolled_back_steps_starts_over(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.losses(1, 2, 3, 4)
    deliverer.look(NOW)
    job.begin(2)
    deliverer.look(NOW)
    job.losses(3)
    deliverer.look(NOW)
    assert losses_of(sink, job) == {1: loss(1, 1), 2: loss(2, 1), 3: loss(3, 2)}
    assert (cursor_of(db, job).generation, cursor_of(db, job).max_step) == (1, 3)
    job.begin(3)
    job.losses(4)
    deliverer.look(NOW)
    assert losses_of(sink, job)[4] == loss(4, 2 + 1)
    assert cursor_of(db, job).generation == 1, "nothing that was written was rolled back"


def test_a_rollback_to_the_beginning_empties_the_sink_even_if_nothing_follows(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.losses(1, 2)
    deliverer.look(NOW)
    job.begin(0)
    job.end(JobState.FAILED)
    deliverer.look(NOW)
    assert sink.points[job.id] == {}
    assert sink.ends == {job.id: JobState.FAILED}


def test_a_sink_that_takes_back_gets_everything_in_order(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink(takes_back=True)
    deliverer = Deliverer(db, sink)
    job.losses(1, 2, 3, 4)
    deliverer.look(NOW)
    job.begin(2)
    job.losses(3)
    deliverer.look(NOW)
    assert [(p.attempt, p.step) for p in sink.deliveries[-1].points if p.name == "train/loss"] == [(2, 3)]
    assert sink.deliveries[-1].from_steps == {1: 0, 2: 2}
    assert sink.deliveries[-1].generation == 0


def test_an_evaluation_made_again_at_the_step_of_the_checkpoint_is_told_once(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.report({("eval/top1", 10): 0.5})
    deliverer.look(NOW)
    job.begin(10)
    job.report({("eval/top1", 10): 0.25, ("eval/loss", 10): 2.0})
    deliverer.look(NOW)
    assert sink.points[job.id] == {("eval/top1", 10): 0.5, ("eval/loss", 10): 2.0}
    # The first one does not count any more once the job went on before it.
    job.begin(5)
    job.report({("eval/top1", 10): 0.75})
    deliverer.look(NOW)
    assert sink.points[job.id] == {("eval/top1", 10): 0.75}


# -- failing -----------------------------------------------------------------------------------------------------------
def test_a_sink_that_is_away_is_left_alone_longer_each_time_and_told_of_once(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.losses(1)
    sink.fail_next = 3
    now, looked = NOW, 0
    for _ in range(60):
        before = sink.fail_next
        deliverer.look(now)
        looked += before != sink.fail_next
        now += timedelta(seconds=1)
    assert looked == 3
    assert losses_of(sink, job) == {1: loss(1, 1)}
    ((type_, message),) = events_of(db, job)
    assert (type_, message) == (
        "metrics.delayed",
        "Metrics are not in recording yet, training goes on: http://user:***@sink does not answer",
    )
    job.end()
    deliverer.look(now)
    assert [type_ for type_, _ in events_of(db, job)] == ["metrics.delayed", "metrics.delivered"]


def test_a_sinks_condition_is_kept(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    job.losses(1)

    def row() -> SinkRow:
        with db.reader() as session:
            return session.get_one(SinkRow, "recording")

    sink.missing = "the package x is not installed"
    Deliverer(db, sink).look(NOW)
    assert (row().ok, row().message, row().since) == (False, "the package x is not installed", NOW)
    assert events_of(db, job) == [], "it is nothing of this job's"
    sink.missing = ""
    Deliverer(db, sink).look(LATER)
    Deliverer(db, sink).look(LATER + timedelta(seconds=9))
    assert (row().ok, row().message, row().since) == (True, "", LATER)
    assert row().seen_at == LATER + timedelta(seconds=9)
    forget_other_sinks(db, {"recording"})
    assert row().ok
    forget_other_sinks(db, {"mlflow"})
    with db.reader() as session:
        assert session.get(SinkRow, "recording") is None


def test_a_job_that_is_refused_holds_up_no_other(db: Database) -> None:
    old, new = ReportedJob(db), ReportedJob(db, created_at=LATER)
    sink = RecordingSink()
    deliverer = Deliverer(db, sink)
    for job in (old, new):
        job.losses(1)
    sink.refused = {new.id}
    assert deliverer.look(NOW) == 1
    assert losses_of(sink, old) == {1: loss(1, 1)}
    assert events_of(db, new) == [
        ("metrics.delayed", "Metrics are not in recording yet, training goes on: not this one")
    ]
    sink.refused = set()
    assert deliverer.look(NOW + pause(1) - timedelta(seconds=1)) == 0
    assert deliverer.look(NOW + pause(1)) == 1
    assert losses_of(sink, new) == {1: loss(1, 1)}
    assert cursor_of(db, new).failures == 0


def test_a_bug_in_one_jobs_sink_is_survived(db: Database) -> None:
    job = ReportedJob(db)
    job.losses(1)

    class Broken(RecordingSink):
        def write(self, delivery):  # type: ignore[no-untyped-def]
            raise KeyError("s3cret")

    assert Deliverer(db, Broken()).look(NOW) == 0
    assert events_of(db, job)[0][1].endswith("KeyError: '***'")


def test_pauses_grow_up_to_a_bound() -> None:
    assert [pause(n).total_seconds() for n in (1, 2, 3, 50)] == [5.0, 10.0, 20.0, LONGEST_PAUSE_S]


def test_a_running_job_is_written_every_so_often_and_its_end_at_once(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink(every_s=30.0)
    deliverer = Deliverer(db, sink)
    job.losses(1)
    assert deliverer.look(NOW) == 1
    job.losses(2)
    assert deliverer.look(NOW + timedelta(seconds=29)) == 0
    assert deliverer.look(NOW + timedelta(seconds=30)) == 1
    job.losses(3)
    job.end()
    assert deliverer.look(NOW + timedelta(seconds=31)) == 1
    assert set(losses_of(sink, job)) == {1, 2, 3}


def test_a_job_without_metrics_is_not_told_of_and_not_looked_at_again(db: Database) -> None:
    job, sink = ReportedJob(db), RecordingSink()
    deliverer = Deliverer(db, sink)
    job.report()
    job.end()
    deliverer.look(NOW)
    assert sink.deliveries == []
    assert deliverer.look(NOW) == 0
    assert cursor_of(db, job).done


def test_points_from_before_the_arrival_order_was_kept_come_first(db: Database) -> None:
    """What the migration made of them: negative numbers, by step."""
    job, sink = ReportedJob(db), RecordingSink()
    with db.session() as session:
        for step in (1, 2):
            seq = step - 2**40
            row = MetricRow(job_id=job.id, name="train/loss", step=step, attempt=1, seq=seq, value=step + 0.125, at=NOW)
            session.add(row)
    job.losses(3)
    Deliverer(db, sink).look(NOW)
    assert [p.step for p in sink.deliveries[0].points if p.name == "train/loss"] == [1, 2, 3]
