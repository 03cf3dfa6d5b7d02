"""Searches as users see and steer them: how far, which trials, the best one, more trials, fewer slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sqlalchemy.orm import Session

from configs.layout import search_picture_key, search_report_key
from configs.search import MAX_TRIALS
from configs.search_results import best_trial
from configs.search_wire import SearchReport, TrialRecord
from configs.states import JobState
from orchestrator.control.trials import copy_trials
from orchestrator.search_schemas import SearchPublic, TrialPage, TrialPublic
from orchestrator.services.auth import Actor
from orchestrator.services.idempotency import Answer, Key, claim, remember
from orchestrator.services.jobs import find_job, publish
from orchestrator.services.problems import Invalid, NotFound, WrongState, field_error
from orchestrator.services.submission import Submitted, copy_job, insert_job, replayed, require_checkpoint
from orchestrator.services.trials import search_spec, trial_records
from orchestrator.storage import store as object_store
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.registry import newest_checkpoint
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import JobRow, SearchRow


def find_search(session: Session, job_id: str) -> JobRow:
    """The search's row. Raises NotFound: there is no such job, or it is none."""
    row = find_job(session, job_id)
    if row.kind != "search":
        raise NotFound(f"Job {job_id} is no search but of kind {row.kind}.", hint="`patchwork list --kind search`.")
    return row


def get_search(db: Database, job_id: str) -> SearchPublic:
    """Raises NotFound."""
    with db.reader() as session:
        row = find_search(session, job_id)
        spec, limits = search_spec(row), session.get_one(SearchRow, row.id)
        trials = trial_records(session, row)
        best = best_trial(spec, trials)
        final = next((trial for trial in trials if trial.role == "final"), None)
        return SearchPublic(
            job=publish(session, [row])[0],
            metric=spec.metric,
            mode=spec.natural_mode,
            num_trials=limits.num_trials,
            slots=limits.slots,
            places=limits.places,
            num_ended=sum(trial.state.is_terminal for trial in trials),
            states=dict(Counter(str(trial.state) for trial in trials)),
            gpu_seconds=sum(trial.gpu_seconds for trial in trials),
            best=None if best is None else _public(session, best),
            final=None if final is None else _public(session, final),
        )


def list_trials(db: Database, job_id: str, with_curves: bool) -> TrialPage:
    """The search's trials by number. Raises NotFound."""
    with db.reader() as session:
        row = find_search(session, job_id)
        return TrialPage(items=tuple(_public(session, t, with_curves) for t in trial_records(session, row)))


def get_best(db: Database, job_id: str) -> TrialPublic:
    """The best trial so far. Raises NotFound: no trial has a value yet."""
    with db.reader() as session:
        row = find_search(session, job_id)
        spec = search_spec(row)
        best = best_trial(spec, trial_records(session, row))
        if best is None:
            raise NotFound(f"No trial of {job_id} has a value of {spec.metric} yet.")
        return _public(session, best, with_curve=True)


def get_report(db: Database, store: ObjectStore, job_id: str) -> SearchReport:
    """What a search found. Raises NotFound: it has not ended with a value, StoreError."""
    return SearchReport.model_validate_json(_file(db, store, job_id, search_report_key))


def get_picture(db: Database, store: ObjectStore, job_id: str) -> bytes:
    """The report's picture, a PNG. Raises NotFound, StoreError."""
    return _file(db, store, job_id, search_picture_key)


def add_trials(db: Database, actor: Actor, job_id: str, num_trials: int, key: Key | None) -> Submitted:
    """Let a search make so many more trials. One that has ended goes on as a new job, which knows its trials.

    Raises:
        NotFound, KeyReused
        Invalid: a grid has no more settings, they are no multiple of the repeats, or too many in all.
        SpecError: the checkpoint that its trials start from is gone.
        WrongState: it is being cancelled.
    """
    with db.session() as session:
        earlier = claim(session, key)
        if earlier is not None:
            return replayed(earlier)
        find_search(session, job_id)
        row = lock_job(session, job_id)
        assert row is not None, "jobs are never deleted"
        limits = session.get_one(SearchRow, job_id)
        wanted = limits.num_trials + num_trials
        _check_more(row, num_trials, wanted)
        data = {"trials": num_trials, "num_trials": wanted}
        if JobState(row.state).is_terminal:
            if row.init_from is not None and "/" not in row.init_from:
                require_checkpoint(session, row.init_from)
            new = copy_job(row, None)
            new.total_steps = wanted
            submitted = insert_job(session, actor, new, key)
            copy_trials(session, row, new.id, wanted)
            message = f"{num_trials} more trials: goes on as {new.id}"
            record(session, job_id, "search.extended", message, actor.name, data=data | {"job_id": new.id})
            return submitted
        if row.desired == "stop":
            raise WrongState(f"Search {job_id} is being cancelled.", state=row.state)
        limits.num_trials = row.total_steps = wanted
        row.version += 1
        record(session, job_id, "search.extended", f"{num_trials} more trials: {wanted} in all", actor.name, data=data)
        answer = Answer(202, publish(session, [row])[0].model_dump_json().encode())
        remember(session, key, answer)
        return Submitted(job_id, answer, replayed=False)


def set_slots(db: Database, actor: Actor, job_id: str, slots: int | None) -> SearchPublic:
    """Let so many trials run side by side from now on; those that run go on. Raises NotFound, WrongState."""
    with db.session() as session:
        find_search(session, job_id)
        row = lock_job(session, job_id)
        assert row is not None, "jobs are never deleted"
        if JobState(row.state).is_terminal:
            raise WrongState(f"Search {job_id} has ended ({row.state}).", state=row.state, allowed_actions=[])
        session.get_one(SearchRow, job_id).slots = slots
        row.version += 1
        message = f"{slots or 'As many'} trials side by side{'' if slots else ' as there are workers'}"
        record(session, job_id, "search.slots", message, actor.name, data={"slots": slots})
    return get_search(db, job_id)


def _check_more(row: JobRow, num_trials: int, wanted: int) -> None:
    spec = search_spec(row)
    if spec.algorithm == "grid":
        message = f"the grid of {row.id} is tried as a whole: there are no more settings"
        raise Invalid("A grid has no more trials.", errors=[field_error("/trials", message, num_trials, "none")])
    if num_trials % spec.repeats:
        message = f"{num_trials} is no multiple of the search's {spec.repeats} repeats"
        allowed = f"a multiple of {spec.repeats}"
        raise Invalid("Repeats come together.", errors=[field_error("/trials", message, num_trials, allowed)])
    if wanted > MAX_TRIALS:
        message = f"{wanted} trials in all are more than {MAX_TRIALS}"
        raise Invalid("Too many trials.", errors=[field_error("/trials", message, num_trials, f"at most {MAX_TRIALS}")])


def _public(session: Session, trial: TrialRecord, with_curve: bool = False) -> TrialPublic:
    job, checkpoint = session.get_one(JobRow, trial.job_id), newest_checkpoint(session, trial.job_id)
    return TrialPublic(
        **trial.model_dump(mode="json", exclude={"asked_after", "told", "curve", "has_metric"}),
        value=trial.value,
        curve=trial.curve if with_curve else (),
        checkpoint=None if checkpoint is None else checkpoint.id,
        started_at=job.started_at,
        ended_at=job.ended_at,
    )


def _file(db: Database, store: ObjectStore, job_id: str, key: Callable[[str], str]) -> bytes:
    with db.reader() as session:
        row = find_search(session, job_id)
    try:
        return store.get(key(job_id))
    except object_store.NotFound:
        raise NotFound(
            f"Search {job_id} has no report: it is {row.state}.", hint="It leaves one when it has succeeded."
        ) from None
