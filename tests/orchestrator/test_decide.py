from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from configs.reasons import EXIT_REASONS, ExitReason, QueueReason
from configs.states import AttemptState, Desired, JobState
from orchestrator.control.decide import (
    EXIT_LINGER_S,
    HANG_MARGIN_S,
    KILL_AGAIN_S,
    RECOVERY_HOLD_S,
    AskToLeave,
    Decision,
    End,
    Kill,
    Launch,
    MarkRunning,
    Observation,
    Reap,
    Settle,
    Submit,
    Wait,
    Withdraw,
    decide,
)
from orchestrator.control.launcher import JobStatus, LaunchState
from orchestrator.control.retries import Ended, Policy, backoff_s, follow
from orchestrator.control.transitions import successors
from orchestrator.settings import Settings
from tests.factories import NOW, make_attempt, make_exit, make_job

SETTINGS = Settings(
    start_timeout_s=180, hang_timeout_s=100, report_timeout_s=60, stop_grace_s=60, backoff_initial_s=2, backoff_max_s=60
)
LONG_AGO = NOW - timedelta(hours=1)
RUNNING_STATUS = JobStatus(LaunchState.RUNNING)
GONE = {"status": JobStatus(LaunchState.FAILED, "exit code 1"), "leftovers": ()}


def seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


def saw(**fields: Any) -> Observation:
    values = {"watching_since": LONG_AGO, "cluster_id": "session_1", "status": RUNNING_STATUS}
    return Observation(**(values | fields))


def on(
    job: dict[str, Any] | None = None,
    attempt: dict[str, Any] | None = None,
    policy: Policy | None = None,
    **seen: Any,
) -> Decision:
    """The decision for a running job with two workers that have reported, with these differences."""
    row = make_job(**({"state": JobState.RUNNING, "state_since": NOW} | (job or {})))
    fields = {
        "state": AttemptState.RUNNING,
        "ranks": {"0": {}, "1": {}},
        "phase": "training",
        "claim_nonce": "n",
        "last_report_at": NOW,
        "last_progress_at": NOW,
    }
    last = make_attempt(row, **(fields | (attempt or {})))
    return decide(row, last, saw(**seen), NOW, SETTINGS, policy or Policy(), jitter=0.5)


NOT_STARTED = {
    "state": AttemptState.STARTING,
    "ranks": {},
    "claim_nonce": None,
    "last_report_at": None,
    "last_progress_at": None,
}
PREPARING = {"state": JobState.PREPARING}


# -- at rest ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Wait),
        ({"start_workers": 2}, Launch(2)),
        ({"desired": Desired.STOP}, JobState.CANCELLED),
        ({"desired": Desired.STOP, "start_workers": 2}, JobState.CANCELLED),
        ({"desired": Desired.PAUSE}, JobState.PAUSED),
        ({"state": JobState.PAUSED, "desired": Desired.PAUSE}, Wait),
        ({"state": JobState.PAUSED, "desired": Desired.STOP}, JobState.CANCELLED),
        ({"state": JobState.PAUSED, "desired": Desired.RUN}, JobState.QUEUED),
    ],
)
def test_jobs_of_which_nothing_runs(fields: dict[str, Any], expected: object) -> None:
    decision = decide(make_job(**fields), None, saw(), NOW, SETTINGS, Policy())
    if isinstance(expected, JobState):
        assert isinstance(decision, Settle)
        assert decision.next.state is expected
    else:
        assert decision == expected or isinstance(decision, expected)  # type: ignore[arg-type]


# -- a live attempt ----------------------------------------------------------------------
@pytest.mark.parametrize("seen", [{"cluster_id": None, "status": None}, {"status": None}])
@pytest.mark.parametrize("state", [JobState.PREPARING, JobState.RUNNING, JobState.PAUSING, JobState.STOPPING])
def test_unreachable_is_a_condition_not_a_failure(state: JobState, seen: dict[str, Any]) -> None:
    decision = on({"state": state}, **seen)
    assert isinstance(decision, Wait)
    assert decision.condition is not None
    assert decision.condition.reason is QueueReason.CLUSTER_UNREACHABLE


def test_unreachable_outranks_even_the_exit_file() -> None:
    """It says how the attempt ended, not that nothing of it lives."""
    assert isinstance(on(cluster_id=None, status=None, exit=make_exit("a", ExitReason.WORKER_LOST)), Wait)


def test_a_healthy_attempt_is_left_alone() -> None:
    assert on() == Wait(SETTINGS.poll_s)


def test_all_ranks_make_it_running() -> None:
    assert on(PREPARING) == MarkRunning()
    assert on({"state": JobState.RECOVERING}) == MarkRunning()
    assert isinstance(on(PREPARING, {"ranks": {"0": {}}}), Wait)


def test_an_attempt_the_cluster_does_not_know_is_submitted_again() -> None:
    missing = JobStatus(LaunchState.MISSING)
    assert on(PREPARING, NOT_STARTED | {"submitted_at": None}, status=missing) == Submit()
    assert on(PREPARING, NOT_STARTED, status=missing) == Submit()


def test_an_attempt_lost_with_its_cluster_before_it_began_is_submitted_to_the_new_one() -> None:
    assert on(PREPARING, NOT_STARTED, cluster_id="session_2", status=None) == Submit()


def test_an_attempt_that_has_not_begun_is_not_submitted_once_it_is_cancelled() -> None:
    decision = on(PREPARING | {"desired": Desired.STOP}, NOT_STARTED, status=JobStatus(LaunchState.MISSING))
    assert isinstance(decision, End)
    assert decision.next.state is JobState.CANCELLED


def test_another_cluster_is_proof_of_death() -> None:
    decision = on(cluster_id="session_2", status=None)
    assert isinstance(decision, End)
    assert decision.reason is ExitReason.CLUSTER_LOST
    assert decision.next.state is JobState.RECOVERING


def test_a_claimed_attempt_the_cluster_forgot_is_lost() -> None:
    decision = on(status=JobStatus(LaunchState.MISSING), leftovers=())
    assert isinstance(decision, End)
    assert decision.reason is ExitReason.DRIVER_LOST


@pytest.mark.parametrize("state", [LaunchState.STOPPED, LaunchState.FAILED, LaunchState.SUCCEEDED])
def test_no_end_without_proof_that_nothing_is_left(state: LaunchState) -> None:
    said = make_exit("a", ExitReason.WORKER_LOST)
    assert on(status=JobStatus(state), exit=said, leftovers=("actor 1",)) == Reap(("actor 1",))
    assert isinstance(on(status=JobStatus(state), exit=said, leftovers=None), Wait)
    assert isinstance(on(status=JobStatus(state), exit=said, leftovers=()), End)


def test_exit_file_outranks_what_the_cluster_says() -> None:
    decision = on(exit=make_exit("a", ExitReason.NODE_LOST, message="node 7 left"), **GONE)
    assert isinstance(decision, End)
    assert (decision.reason, decision.message) == (ExitReason.NODE_LOST, "node 7 left")


def test_a_driver_that_leaves_no_word_is_lost() -> None:
    decision = on(**GONE)
    assert isinstance(decision, End)
    assert decision.reason is ExitReason.DRIVER_LOST
    assert "exit code 1" in decision.message


def test_a_driver_gets_time_to_leave_after_its_last_word() -> None:
    def after(wait_s: float) -> Decision:
        return on(exit=make_exit("a", ExitReason.COMPLETED, ended_at=NOW - seconds(wait_s)))

    assert isinstance(after(EXIT_LINGER_S - 1), Wait)
    assert after(EXIT_LINGER_S + 1) == Kill(None, "The driver stayed after it had written how the attempt ended.")


# -- force ----------------------------------------------------------------------
def test_workers_that_do_not_start_in_time() -> None:
    def after(wait_s: float, **seen: Any) -> Decision:
        return on(PREPARING, NOT_STARTED | {"submitted_at": NOW - seconds(wait_s)}, **seen)

    assert isinstance(after(179), Wait)
    decision = after(181)
    assert isinstance(decision, Kill)
    assert decision.reason is ExitReason.START_TIMEOUT
    # A controller that has just come back has not seen the silence: it begins to count now.
    assert isinstance(after(181, watching_since=NOW), Wait)


def hung(report_s: float, progress_s: float, **attempt: Any) -> Decision:
    """Last report and last progress so many seconds ago."""
    times = {"last_report_at": NOW - seconds(report_s), "last_progress_at": NOW - seconds(progress_s)}
    return on(None, times | attempt)


def test_no_progress_while_reporting_is_a_hang() -> None:
    limit = SETTINGS.hang_timeout_s + HANG_MARGIN_S
    assert isinstance(hung(0, limit - 1), Wait)
    decision = hung(0, limit + 1)
    assert isinstance(decision, Kill)
    assert decision.reason is ExitReason.WORKER_HUNG


def test_an_evaluation_may_take_longer_than_a_step() -> None:
    assert isinstance(hung(0, 1000, phase="evaluating"), Wait)


def test_silence_is_not_a_hang() -> None:
    """The API was away, or the driver is cut off: it may be training all the while."""
    decision = hung(1000, 1000)
    assert isinstance(decision, Wait)
    assert decision.condition is not None


def test_killed_is_given_time_then_killed_again() -> None:
    assert isinstance(on(None, {"killed_at": NOW - seconds(1), "kill_reason": "WORKER_HUNG"}), Wait)
    decision = on(None, {"killed_at": NOW - seconds(KILL_AGAIN_S + 1), "kill_reason": "WORKER_HUNG"})
    assert isinstance(decision, Kill)
    assert decision.reason is ExitReason.WORKER_HUNG


def test_the_reason_of_a_kill_outranks_what_the_dying_driver_says() -> None:
    killed = {"killed_at": NOW, "kill_reason": "WORKER_HUNG"}
    decision = on(None, killed, exit=make_exit("a", ExitReason.USER_CANCELLED), **GONE)
    assert isinstance(decision, End)
    assert decision.reason is ExitReason.WORKER_HUNG


# -- orders ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("desired", "to"),
    [(Desired.STOP, JobState.STOPPING), (Desired.PAUSE, JobState.PAUSING), (Desired.YIELD, JobState.PAUSING)],
)
def test_order_grace_force(desired: Desired, to: JobState) -> None:
    asked = on({"desired": desired})
    assert isinstance(asked, AskToLeave)
    assert asked.to is to
    waiting = {"state": to, "desired": desired}
    assert isinstance(on(waiting, {"stop_requested_at": NOW - seconds(59)}), Wait)
    killed = on(waiting, {"stop_requested_at": NOW - seconds(61)})
    assert isinstance(killed, Kill)
    assert EXIT_REASONS[ExitReason(killed.reason or "")] is not None
    assert isinstance(on(waiting, {"stop_requested_at": NOW - seconds(61)}, watching_since=NOW), Wait)


def test_cancelling_a_job_that_pauses() -> None:
    decision = on({"state": JobState.PAUSING, "desired": Desired.STOP}, {"stop_requested_at": NOW})
    assert isinstance(decision, AskToLeave)
    assert decision.to is JobState.STOPPING


def test_a_pause_that_is_withdrawn_in_time() -> None:
    assert on({"state": JobState.PAUSING}, {"stop_requested_at": NOW}) == MarkRunning()
    assert on({"state": JobState.PAUSING}, {"stop_requested_at": NOW, "ranks": {}}) == Withdraw()


def test_deadline_counts_running_time_of_all_attempts() -> None:
    policy = Policy(deadline_s=100)
    attempt = {"created_at": NOW - seconds(60)}
    assert isinstance(on(None, attempt, policy, ran_s=39), Wait)
    decision = on(None, attempt, policy, ran_s=41)
    assert isinstance(decision, AskToLeave)
    assert (decision.to, decision.reason) == (JobState.STOPPING, ExitReason.DEADLINE)


def test_after_the_deadline_the_job_has_failed() -> None:
    job = {"state": JobState.STOPPING, "desired": Desired.STOP, "reason": ExitReason.DEADLINE}
    attempt = {"kill_reason": ExitReason.DEADLINE, "stop_requested_at": NOW}
    decision = on(job, attempt, exit=make_exit("a", ExitReason.USER_CANCELLED), **GONE)
    assert isinstance(decision, End)
    assert (decision.next.state, decision.next.reason) == (JobState.FAILED, ExitReason.DEADLINE)


# -- what follows ----------------------------------------------------------------------
def ended(reason: ExitReason, job: dict[str, Any] | None = None, policy: Policy | None = None, **seen: Any) -> End:
    error = seen.pop("error_type", "")
    decision = on(
        job, None, policy, exit=make_exit("a", reason, error_type=error), **(GONE | {"newest_step": 100} | seen)
    )
    assert isinstance(decision, End)
    return decision


@pytest.mark.parametrize("reason", list(ExitReason))
def test_every_reason_leads_where_its_row_says(reason: ExitReason) -> None:
    row = EXIT_REASONS[reason]
    following = ended(reason, policy=Policy(max_user_failures=0, max_infra_failures=3)).next
    expected = {
        "never": row.final_state,
        "user": JobState.FAILED,
        "infra": JobState.RECOVERING,
        "free": JobState.QUEUED,
        "rollback": JobState.FAILED,
    }
    # Nobody asked for it: somebody else stopped the driver.
    wanted = JobState.RECOVERING if reason is ExitReason.USER_CANCELLED else expected[row.retry]
    assert following.state is wanted
    assert following.state in successors(JobState.RUNNING)
    assert (following.delay_s > 0) == (following.state is JobState.RECOVERING)


def test_rollbacks_cost_nothing_and_have_an_end() -> None:
    policy = Policy(max_rollbacks=2, max_infra_failures=0)
    first, last = (ended(ExitReason.LOSS_SPIKE, policy=policy, num_rollbacks=n).next for n in (0, 1))
    assert (first.state, first.reason, first.delay_s) == (JobState.RECOVERING, ExitReason.LOSS_SPIKE, 0.0)
    assert first.message.startswith("Rollback 1 of 2: ")
    assert last.state is JobState.RECOVERING
    assert (last.user_failures, last.infra_failures) == (0, 0)
    beyond = ended(ExitReason.LOSS_SPIKE, policy=policy, num_rollbacks=2).next
    assert (beyond.state, beyond.reason) == (JobState.FAILED, ExitReason.LOSS_SPIKE)


LIVE = [
    (state, desired)
    for state in JobState
    for desired in Desired
    if state.holds_resources and (state is not JobState.STOPPING or desired is Desired.STOP)
]


@pytest.mark.parametrize("reason", list(ExitReason))
@pytest.mark.parametrize(("state", "desired"), LIVE)
def test_whatever_happens_the_next_state_is_legal(reason: ExitReason, state: JobState, desired: Desired) -> None:
    following = follow(make_job(state=state, desired=desired), Ended(reason), None, Policy(), SETTINGS)
    assert following.state in successors(state) or following.state == state == JobState.RECOVERING


def test_completion_wins_over_a_cancellation() -> None:
    following = ended(ExitReason.COMPLETED, {"state": JobState.STOPPING, "desired": Desired.STOP}).next
    assert (following.state, following.reason) == (JobState.SUCCEEDED, ExitReason.COMPLETED)


def test_completion_without_its_last_checkpoint_is_none() -> None:
    decision = ended(ExitReason.COMPLETED, newest_step=90)
    assert (decision.reason, decision.next.state) == (ExitReason.STORAGE_ERROR, JobState.RECOVERING)
    assert (
        ended(ExitReason.COMPLETED, policy=Policy(is_training=False), newest_step=None).next.state is JobState.SUCCEEDED
    )


@pytest.mark.parametrize(
    ("desired", "reason", "state"),
    [
        (Desired.STOP, ExitReason.WORKER_LOST, JobState.CANCELLED),
        (Desired.STOP, ExitReason.USER_ERROR, JobState.CANCELLED),
        (Desired.PAUSE, ExitReason.PAUSED, JobState.PAUSED),
        (Desired.PAUSE, ExitReason.WORKER_LOST, JobState.PAUSED),
        (Desired.PAUSE, ExitReason.NAN_LOSS, JobState.FAILED),
        (Desired.YIELD, ExitReason.PREEMPTED, JobState.QUEUED),
        (Desired.RUN, ExitReason.PAUSED, JobState.QUEUED),
        (Desired.RUN, ExitReason.PREEMPTED, JobState.QUEUED),
    ],
)
def test_orders_decide_over_retries(desired: Desired, reason: ExitReason, state: JobState) -> None:
    following = ended(reason, {"desired": desired, "infra_failures": 2}).next
    assert following.state is state
    if state is not JobState.FAILED:
        assert following.infra_failures == 2
    assert following.desired == (Desired.RUN if state is JobState.QUEUED else None)


def test_infrastructure_budget() -> None:
    policy = Policy(max_infra_failures=2)
    second = ended(ExitReason.NODE_LOST, {"infra_failures": 1}, policy).next
    assert (second.state, second.infra_failures) == (JobState.RECOVERING, 2)
    third = ended(ExitReason.NODE_LOST, {"infra_failures": 2}, policy).next
    assert (third.state, third.reason) == (JobState.FAILED, ExitReason.NODE_LOST)


def test_progress_refills_the_infrastructure_budget() -> None:
    following = ended(
        ExitReason.NODE_LOST, {"infra_failures": 2}, Policy(max_infra_failures=2), made_progress=True
    ).next
    assert (following.state, following.infra_failures) == (JobState.RECOVERING, 1)


def test_user_failures_are_retried_only_on_request() -> None:
    assert ended(ExitReason.USER_ERROR).next.state is JobState.FAILED
    following = ended(ExitReason.USER_ERROR, policy=Policy(max_user_failures=1)).next
    assert (following.state, following.user_failures, following.infra_failures) == (JobState.RECOVERING, 1, 0)
    spent = ended(ExitReason.USER_ERROR, {"user_failures": 1}, Policy(max_user_failures=1)).next
    assert (spent.state, spent.reason) == (JobState.FAILED, ExitReason.USER_ERROR)


@pytest.mark.parametrize(
    ("reason", "before", "seen", "is_loop"),
    [
        (ExitReason.USER_ERROR, Ended(ExitReason.USER_ERROR, error_type="KeyError"), {}, True),
        (ExitReason.USER_ERROR, Ended(ExitReason.USER_ERROR, error_type="ValueError"), {}, False),
        (ExitReason.USER_ERROR, Ended(ExitReason.DATA_ERROR, error_type="KeyError"), {}, False),
        (ExitReason.USER_ERROR, Ended(ExitReason.USER_ERROR, error_type="KeyError", made_progress=True), {}, False),
        (ExitReason.USER_ERROR, Ended(ExitReason.USER_ERROR, error_type="KeyError"), {"made_progress": True}, False),
        (ExitReason.USER_ERROR, None, {}, False),
        (ExitReason.PLATFORM_ERROR, Ended(ExitReason.PLATFORM_ERROR, error_type="KeyError"), {}, True),
        (
            ExitReason.PLATFORM_ERROR,
            Ended(ExitReason.PLATFORM_ERROR, error_type="KeyError", made_a_step=True, last_step=1_000_000),
            {},
            False,
        ),
        (
            # The same error at the same step, in both attempts.
            ExitReason.PLATFORM_ERROR,
            Ended(ExitReason.PLATFORM_ERROR, error_type="KeyError", made_a_step=True, last_step=0),
            {},
            True,
        ),
    ],
)
def test_crash_loop(reason: ExitReason, before: Ended | None, seen: dict[str, Any], is_loop: bool) -> None:
    policy = Policy(max_user_failures=9, max_infra_failures=9)
    following = ended(reason, None, policy, error_type="KeyError", previous=before, **seen).next
    assert (following.reason == ExitReason.CRASH_LOOP) == is_loop
    assert following.state is (JobState.FAILED if is_loop else JobState.RECOVERING)


def test_two_lost_nodes_in_a_row_are_no_crash_loop() -> None:
    following = ended(
        ExitReason.NODE_LOST, previous=Ended(ExitReason.NODE_LOST), policy=Policy(max_infra_failures=5)
    ).next
    assert following.state is JobState.RECOVERING


def test_back_off_doubles_to_a_limit_and_is_spread() -> None:
    assert [backoff_s(n, SETTINGS, 0.5) for n in (1, 2, 3, 4, 5, 6, 99)] == [2, 4, 8, 16, 32, 60, 60]
    assert backoff_s(1, SETTINGS, 0.0) == pytest.approx(1.6)
    assert backoff_s(1, SETTINGS, 1.0) == pytest.approx(2.4)


# -- recovering ----------------------------------------------------------------------
def recovering(fields: dict[str, Any] | None = None, **seen: Any) -> Decision:
    return on({"state": JobState.RECOVERING} | (fields or {}), {"state": AttemptState.ENDED}, **seen)


def test_recovering_waits_for_its_back_off_then_launches() -> None:
    assert recovering({"not_before": NOW + seconds(3)}, fitting_world_size=2) == Wait(3.0)
    assert recovering({"not_before": NOW}, fitting_world_size=2) == Launch(2)


def test_recovering_holds_its_place_for_a_while_then_queues() -> None:
    waiting = recovering({"state_since": NOW - seconds(RECOVERY_HOLD_S - 1)})
    assert isinstance(waiting, Wait)
    assert waiting.condition is not None
    given_up = recovering({"state_since": NOW - seconds(RECOVERY_HOLD_S + 1)})
    assert isinstance(given_up, Settle)
    assert (given_up.next.state, given_up.next.reason) == (JobState.QUEUED, QueueReason.WAITING_FOR_WORKERS)
    still = recovering({"state_since": NOW - seconds(RECOVERY_HOLD_S + 1)}, watching_since=NOW)
    assert isinstance(still, Wait)


def test_recovering_does_not_give_up_its_place_to_a_silent_cluster() -> None:
    assert isinstance(recovering({"state_since": LONG_AGO}, cluster_id=None), Wait)


@pytest.mark.parametrize(
    ("desired", "state"),
    [(Desired.STOP, JobState.CANCELLED), (Desired.PAUSE, JobState.PAUSED), (Desired.YIELD, JobState.QUEUED)],
)
def test_recovering_obeys_orders_at_once(desired: Desired, state: JobState) -> None:
    decision = recovering({"desired": desired, "not_before": NOW + seconds(100)}, cluster_id=None)
    assert isinstance(decision, Settle)
    assert decision.next.state is state
