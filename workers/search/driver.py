"""The driver of a search: Ray Tune's controller in the driver's process of one attempt.

    state            the trials as the control plane has them; the sampler is brought to where it was
    next_trial       unfinished trials first, then new settings, as many as there are places
    look             what came from each trial's ranks goes on; its metric is judged (rules.py); ends are closed
    finish           best setting, final run, report, exit.json

Several times a second, in one thread; what waits for the network for long does so in others. A trial that fails is a
row that says so. The control plane's rows are the truth: an attempt that follows this one goes on from them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.reasons import ExitReason
from configs.resolve import load_resolved
from configs.search import Asha, MedianStopping, Pbt
from configs.search_trials import workers_per_trial
from configs.search_wire import SearchLimits, TrialCreate, TrialEnded, TrialRecord
from configs.spec import SearchJob
from configs.states import Desired
from configs.wire import AttemptFile, ClaimRequest, ExitFile, Heartbeat, MetricPoint
from workers import logs
from workers.control_plane import ControlPlaneError, SearchPlane, Superseded, Unreachable
from workers.courier import Couriers
from workers.diagnosis import ORDERED, Evidence
from workers.driver import EXIT_WRITE_S, FINAL_REPORT_S, FLUSH_S, evidence_of, put_exit
from workers.forwarder import Forwarder
from workers.hub import Drained
from workers.node import NodeSettings
from workers.search.book import Book
from workers.search.group import TrialWorkerGroup
from workers.search.hub import SearchHub
from workers.search.report import write_report
from workers.search.rules import Exploit, asha, exploit, median
from workers.search.trial import Place, TrialRun, open_trial
from workers.search.tune import Controller, TuneTrial
from workers.store import ObjectStore

log = structlog.get_logger(__name__)
LOOK_S = 0.2
LIMITS_S = 2.0
PAUSE_S = 1.0
"""Between two tries to reach the control plane for something that a trial needs."""
STATE_DEADLINE_S = 600.0
END_GRACE_S = 30.0


def drive_search(
    attempt: AttemptFile,
    settings: NodeSettings,
    store: ObjectStore,
    forwarder: Forwarder,
    couriers: Couriers,
    scratch: Path,
    terminated: threading.Event,
    run_rank: Callable[..., Any] | None = None,
) -> ExitFile | None:
    """Drives the attempt of a search to its end. Returns what was written, None if nothing could be."""
    plane = SearchPlane(settings.api_url, settings.worker_secret.get_secret_value(), attempt.attempt_id)
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=False)
    hub_class = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=beside)(SearchHub)
    claim = ClaimRequest(nonce=uuid.uuid4().hex, node=socket.gethostname(), pid=os.getpid())
    place = Place(settings, store, plane, hub_class.remote, here, scratch / "trials", claim, terminated)
    driver = SearchDriver(attempt, place, forwarder, terminated, run_rank)
    reason, message = driver.run()
    exit_file = ExitFile(
        attempt_id=attempt.attempt_id,
        reason=reason,
        message=logs.clean(message),
        last_step=driver.num_ended,
        ended_at=datetime.now(UTC),
    )
    log.info("The search's attempt ends.", reason=str(reason), message=message)
    is_written = terminated.is_set() and put_exit(store, exit_file, EXIT_WRITE_S)
    couriers.flush(FLUSH_S)
    if not forwarder.finish(FINAL_REPORT_S):
        log.warning("Not all reports could be delivered.")
    return exit_file if is_written or put_exit(store, exit_file, EXIT_WRITE_S) else None


class SearchDriver:
    """One attempt of a search. Its listener methods are called by Tune's controller from within `run`."""

    def __init__(
        self,
        attempt: AttemptFile,
        place: Place,
        forwarder: Forwarder,
        terminated: threading.Event,
        run_rank: Callable[..., Any] | None,
    ) -> None:
        spec = load_resolved(attempt.spec)
        assert isinstance(spec, SearchJob)
        self._search, self._attempt, self._place = spec, attempt, place
        self._forwarder, self._terminated, self._run_rank = forwarder, terminated, run_rank
        self._num_places = attempt.world_size // workers_per_trial(spec)
        self._live: dict[str, TrialRun] = {}
        """By attempt."""
        self._closing: dict[Future[TrialEnded | None], TrialRun] = {}
        self._closers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="closer")
        self._not_before: dict[int, float] = {}
        """Trials that are tried again after a while."""
        self._limits: SearchLimits = SearchLimits(num_trials=0)
        self._ran_before_s = 0.0
        self._started_at = time.monotonic()
        self._hub: Any = place.start_hub()
        self._next_ask = self._next_limits = 0.0
        self._beats = 0
        self._stop_reason: tuple[ExitReason, str] | None = None
        """Why no more trials are begun and those that run are stopped."""
        self._book: Book | None = None
        self._controller: Controller | None = None

    @property
    def book(self) -> Book:
        assert self._book is not None, "the state was read"
        return self._book

    @property
    def controller(self) -> Controller:
        assert self._controller is not None, "the state was read"
        return self._controller

    @property
    def num_ended(self) -> int:
        return self._book.num_ended if self._book is not None else 0

    def run(self) -> tuple[ExitReason, str]:
        """Until the search has ended or is told to leave. Returns why it ended."""
        try:
            if (early := self._read_state()) is not None:
                return early
            self._controller = Controller(self)
            while (end := self._turn()) is None:
                pass
            return end
        finally:
            if self._controller is not None:
                self._controller.close()
            self._closers.shutdown(wait=False, cancel_futures=True)

    def _read_state(self) -> tuple[ExitReason, str] | None:
        """The control plane is asked until it answers: without it there is nothing to go on from."""
        until = time.monotonic() + STATE_DEADLINE_S
        while True:
            self._beat()
            if (order := self._order()) is not Desired.RUN:
                return ORDERED[order], "It left before its first trial."
            try:
                state = self._place.plane.state()
            except Superseded as error:
                return ExitReason.FENCED, str(error)
            except ControlPlaneError as error:
                log.warning("The search's state could not be read yet.", error=str(error))
                if time.monotonic() > until:
                    return ExitReason.PLATFORM_ERROR, f"The control plane did not give the search's trials: {error}"
                time.sleep(PAUSE_S)
                continue
            self._limits, self._ran_before_s = state, state.ran_s
            self._book = Book(self._search, state)
            return None

    # -- one turn ------------------------------------------------------------------------------------------------------
    def _turn(self) -> tuple[ExitReason, str] | None:
        began = time.monotonic()
        end = self._look_at_all()
        if end is None:
            time.sleep(max(0.0, LOOK_S - (time.monotonic() - began)))
        return end

    def _look_at_all(self) -> tuple[ExitReason, str] | None:
        self._beat()
        if self._forwarder.is_fenced:
            return ExitReason.FENCED, "Another attempt has the search."
        order = self._order()
        if self._stop_reason is None:
            self._stop_reason = self._budget_used_up()
        self._read_limits()
        self.controller.turn()
        for trial in list(self._live.values()):
            if order is not Desired.RUN and trial.run.forwarder.desired is Desired.RUN:
                trial.run.forwarder.desired = order
            self._look(trial)
        self._collect()
        if self._live or self._closing:
            return None
        if order is not Desired.RUN:
            return ORDERED[order], "It left when it was told to; its trials saved what they had."
        if self._stop_reason is not None and self._stop_reason[0] is not ExitReason.COMPLETED:
            return self._stop_reason
        if not self._has_more():
            # A user may have added trials meanwhile.
            self._next_limits = 0.0
            self._read_limits()
        return None if self._has_more() else self._finish()

    def _order(self) -> Desired:
        if self._forwarder.desired is Desired.RUN and self._terminated.is_set():
            return Desired.YIELD
        return self._forwarder.desired

    def _beat(self) -> None:
        """The control plane hears that the search goes on, and how far it is."""
        self._beats += 1
        beat = Heartbeat(
            rank=0,
            node=socket.gethostname(),
            pid=os.getpid(),
            phase="searching",
            step=self.num_ended,
            at=datetime.now(UTC),
            beats=self._beats,
        )
        self._forwarder.put(Drained(heartbeats={0: beat}))

    def _budget_used_up(self) -> tuple[ExitReason, str] | None:
        budget = self._search.budget
        ran_s = self._ran_before_s + time.monotonic() - self._started_at
        if budget.wall_clock_s is not None and ran_s > budget.wall_clock_s:
            return ExitReason.COMPLETED, f"budget.wall_clock_s {budget.wall_clock_s:g} is used up"
        if budget.gpu_hours is not None:
            spent_s = sum(t.gpu_seconds for t in self.book.trials.values())
            spent_s += sum(t.worker_seconds for t in (*self._live.values(), *self._closing.values()))
            if spent_s > budget.gpu_hours * 3600.0:
                return ExitReason.COMPLETED, f"budget.gpu_hours {budget.gpu_hours:g} is used up"
        return None

    def _read_limits(self) -> None:
        now = time.monotonic()
        if now < self._next_limits:
            return
        self._next_limits = now + LIMITS_S
        try:
            limits = self._place.plane.limits()
        except ControlPlaneError as error:
            log.debug("The search's limits could not be read.", error=str(error))
            return
        self._limits, self.book.num_trials = limits, limits.num_trials

    # -- the listener's part -------------------------------------------------------------------------------------------
    def next_trial(self) -> TuneTrial | None:
        now = time.monotonic()
        num_held = len(self._live)
        limit = self._limits.side_by_side(self._num_places)
        if num_held >= limit or self._stop_reason is not None or self._order() is not Desired.RUN:
            return None
        if now < self._next_ask or self._forwarder.is_fenced:
            return None
        if limit == 1 and self._closing and self._search.algorithm == "tpe":
            # One after the other each setting is chosen knowing all ends before it, however long their last words take.
            return None
        try:
            return self._open_next(now)
        except Unreachable as error:
            log.warning("The next trial could not be begun yet.", error=str(error))
            self._next_ask, self._next_limits = now + PAUSE_S, 0.0
        except Superseded as error:
            log.error("This attempt may not begin trials any more.", error=str(error))
            self._next_ask = now + PAUSE_S
        return None

    def _open_next(self, now: float) -> TuneTrial | None:
        while True:
            record = self._waiting(now) or self._make_new()
            if record is None:
                return None
            if record.state.is_terminal:
                continue
            begun = self._place.plane.begin(record.number)
            self.book.note(begun.trial)
            if begun.attempt is None:
                continue
            trial = open_trial(begun.trial, begun.attempt, self._search.metric, self._hub, self._place)
            self._live[begun.attempt.attempt_id] = trial
            return trial.tune_trial

    def _waiting(self, now: float) -> TrialRecord | None:
        """A trial that was made, has not ended, and is not under way here."""
        under_way = {t.record.number for t in (*self._live.values(), *self._closing.values())}
        for record in self.book.unfinished():
            if record.number not in under_way and self._not_before.get(record.number, 0.0) <= now:
                return record
        return None

    def _make_new(self) -> TrialRecord | None:
        asked = self.book.next_trial()
        if asked is None and not self._live and not self._closing and not self.book.unfinished():
            asked = self.book.final_trial()
        return None if asked is None else self._create(asked)

    def _create(self, asked: TrialCreate) -> TrialRecord:
        record = self._place.plane.create(asked)
        self.book.note(record)
        return record

    def _has_more(self) -> bool:
        if self._stop_reason is not None:
            return False
        return bool(self.book.unfinished() or self.book.next_trial() or self.book.final_trial())

    def on_placed(self, trial: TuneTrial, actor: Any, placement_group: PlacementGroup) -> None:
        run = self._live[trial.trial_id]
        # No secret: Ray shows this to whoever asks. Nodes have their own settings.
        config = {"attempt": run.attempt.model_dump_json(), "hub": run.hub, "run_rank": self._run_rank}
        run.place(TrialWorkerGroup(actor, placement_group, trial.placement_group_factory.bundles, config))

    def on_lost(self, trial: TuneTrial, error: Exception) -> None:
        run = self._live[trial.trial_id]
        log.warning("The first process of a trial could not be started.", trial=run.record.number, error=str(error))
        run.start_error = f"{type(error).__name__}: {error}"

    def judge(self, trial: TuneTrial, step: int, value: float) -> bool:
        run = self._live[trial.trial_id]
        before_step = run.points[-1][0] if run.points else -1
        run.points.append((step, value))
        self.book.trials[run.record.number] = run.record.model_copy(update={"curve": tuple(run.points)})
        run.stop_message = self._verdict(run, before_step)
        return run.stop_message is None

    def _verdict(self, run: TrialRun, before_step: int) -> str | None:
        rule, number = self._search.scheduler, run.record.number
        total = run.record.total_steps or 0
        curves = {t.number: t.curve for t in self.book.trials.values() if t.role == "trial" and t.curve}
        if run.record.role != "trial" or number not in curves:
            return None
        if isinstance(rule, Asha):
            return asha(rule, self._search.sign, number, curves, before_step, total)
        if isinstance(rule, MedianStopping):
            return median(rule, self._search.sign, number, curves, before_step, total)
        if isinstance(rule, Pbt):
            params = {t.number: t.params for t in self.book.trials.values()}
            found = exploit(
                rule,
                self._search.sign,
                number,
                curves,
                params,
                self._search.space,
                self._search.seed,
                before_step,
                total,
                {live.record.number for live in self._live.values()},
            )
            return None if found is None else self._replace(run, found)
        return None

    def _replace(self, run: TrialRun, found: Exploit) -> str | None:
        """Makes the trial that takes this one's place; it is begun once this one has left its workers."""
        asked = self.book.replacement(run.record, found.parent, found.step, found.params)
        try:
            made = self._create(asked)
        except ControlPlaneError as error:
            log.warning("A trial could not be replaced; it goes on.", trial=run.record.number, error=str(error))
            return None
        return f"{found.message} as trial {made.number}"

    # -- looking and closing -------------------------------------------------------------------------------------------
    def _look(self, trial: TrialRun) -> None:
        points, evidence = trial.look()
        if trial.has_lost_hub and trial.hub.actor is self._hub:
            log.error("The hub is gone; trials that begin from now on get another one.")
            self._hub = self._place.start_hub()
        for step, value in points:
            if trial.record.role == "final":
                trial.points.append((step, value))
            elif evidence is None and not self.controller.report(trial.tune_trial, step, value):
                evidence = evidence_of(trial.run, forced=True)
            elif evidence is not None:
                # It has ended: nothing is left to stop, but others are compared with it.
                trial.points.append((step, value))
                self.book.trials[trial.record.number] = trial.record.model_copy(update={"curve": tuple(trial.points)})
            if trial.stop_message is not None:
                break
        if evidence is None and self._stop_reason is not None:
            trial.stop_message = f"The search stopped it: {self._stop_reason[1]}."
            evidence = evidence_of(trial.run, forced=True)
        if evidence is not None:
            self._begin_to_close(trial, evidence)

    def _begin_to_close(self, trial: TrialRun, evidence: Evidence) -> None:
        self.controller.end(trial.tune_trial)
        trial.freed_at = time.monotonic()
        del self._live[trial.attempt.attempt_id]
        self._closing[self._closers.submit(trial.close, evidence, self._place)] = trial

    def _collect(self) -> None:
        for future in [f for f in self._closing if f.done()]:
            trial = self._closing.pop(future)
            ended = future.result()
            if ended is None:
                # Superseded, or the store is away for good: the next attempt, or the next turn, tries it again.
                self._not_before[trial.record.number] = time.monotonic() + END_GRACE_S
                continue
            self.book.note(ended.trial)
            self._not_before[ended.trial.number] = time.monotonic() + ended.delay_s
            if ended.trial.state.is_terminal:
                self._on_ended(ended.trial)

    def _on_ended(self, trial: TrialRecord) -> None:
        log.info("A trial ended.", trial=trial.number, state=str(trial.state), reason=trial.reason, value=trial.value)
        if trial.value is not None and trial.told is not None:
            point = MetricPoint(name="search/value", step=trial.told, value=trial.value, at=datetime.now(UTC))
            self._forwarder.put(Drained(metrics=(point,)))
        message = self.book.why_metric_is_missing(trial)
        if message is not None and self._stop_reason is None:
            self._stop_reason = ExitReason.METRIC_MISSING, message

    def _finish(self) -> tuple[ExitReason, str]:
        trials = list(self.book.trials.values())
        best = write_report(self._place.store, self._attempt.job_id, self._search, trials)
        if best is None:
            failed = next((t for t in trials if t.message), None)
            why = f" Trial {failed.number}: {failed.reason}: {failed.message}" if failed is not None else ""
            return ExitReason.USER_ERROR, f"No trial left a value of {self._search.metric}.{why}"
        ended = f" ({self._stop_reason[1]})" if self._stop_reason is not None else ""
        message = f"Best is trial {best.number}: {self._search.metric} {best.value:.6g} with {best.params}{ended}"
        return ExitReason.COMPLETED, message
