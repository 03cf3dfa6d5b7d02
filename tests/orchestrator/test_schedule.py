from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.reasons import QueueReason
from orchestrator.control.launcher import NodeInfo
from orchestrator.control.scheduling import (
    ClusterView,
    Reservation,
    RunningSearch,
    Start,
    Wait,
    WaitingJob,
    Worker,
    fitting_world_size,
    schedule,
    share_places,
)

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CPU = Worker(cpus=1)


def job(
    name: str, workers: int | tuple[int, ...] = 1, *, priority: int = 50, age_s: float = 0.0, **more: object
) -> WaitingJob:
    sizes = (workers,) if isinstance(workers, int) else workers
    fields = {"worker": CPU, **more}
    return WaitingJob(name, priority, NOW - timedelta(seconds=age_s), sizes, **fields)  # type: ignore[arg-type]


def node(name: str, cpus: float = 4, gpus: float = 0, accelerator: str | None = None, alive: bool = True) -> NodeInfo:
    return NodeInfo(id=name, alive=alive, cpus=cpus, gpus=gpus, accelerator=accelerator)


def view(
    *waiting: WaitingJob, nodes: tuple[NodeInfo, ...] | None = (node("n1"),), reserved: tuple[Reservation, ...] = ()
) -> ClusterView:
    return ClusterView(nodes, waiting, reserved, NOW)


def reasons(decisions: list[Start | Wait]) -> dict[str, object]:
    """job -> world size it starts with, or the reason it waits."""
    return {d.job_id: d.world_size if isinstance(d, Start) else d.reason for d in decisions}


def test_higher_priority_goes_first_then_age_then_id() -> None:
    low_old, mid_new, mid_old = job("a", age_s=90), job("b", priority=60), job("c", priority=60, age_s=10)
    twin = job("d", age_s=90)
    assert [d.job_id for d in schedule(view(twin, mid_new, low_old, mid_old))] == ["c", "b", "a", "d"]


def test_a_gang_starts_whole_or_not_at_all() -> None:
    decisions = schedule(view(job("a", 3), reserved=(Reservation("r", 2, CPU),)))
    assert decisions == [
        Wait("a", QueueReason.WAITING_FOR_WORKERS, "Needs 3 workers with 1 CPU each; 2 such are free.", 1)
    ]


def test_starts_do_not_share_what_is_free() -> None:
    assert reasons(schedule(view(job("a", 3, age_s=2), job("b", 2, age_s=1)))) == {
        "a": 3,
        "b": QueueReason.WAITING_FOR_WORKERS,
    }


def test_waiting_head_is_not_overtaken_by_smaller_newer_jobs() -> None:
    decisions = schedule(
        view(
            job("head", 4, age_s=9),
            job("small", 1, age_s=1),
            job("lesser", 1, priority=10),
            reserved=(Reservation("r", 2, CPU),),
        )
    )
    assert reasons(decisions) == {
        "head": QueueReason.WAITING_FOR_WORKERS,
        "small": QueueReason.BEHIND_OLDER,
        "lesser": QueueReason.BEHIND_HIGHER_PRIORITY,
    }
    assert [d.position for d in decisions if isinstance(d, Wait)] == [1, 2, 3]
    assert "head" in decisions[1].message  # type: ignore[union-attr]


def test_positions_count_only_those_that_wait() -> None:
    decisions = schedule(view(job("a", 4, age_s=3), job("b", 1, age_s=2), job("c", 1, age_s=1)))
    assert decisions[0] == Start("a", 4)
    assert [(d.job_id, d.position) for d in decisions[1:] if isinstance(d, Wait)] == [("b", 1), ("c", 2)]


@pytest.mark.parametrize(
    ("blocked", "reason"),
    [
        (job("x", 9, age_s=9), QueueReason.EXCEEDS_CLUSTER),
        (job("x", 1, age_s=9, worker=Worker(cpus=1, gpus=1)), QueueReason.EXCEEDS_CLUSTER),
        (job("x", 1, age_s=9, worker=Worker(cpus=6)), QueueReason.PLACEMENT_IMPOSSIBLE),
        (job("x", 1, age_s=9, depends_on=(("job_y", "RUNNING"),)), QueueReason.DEPENDENCY),
        (job("x", 1, age_s=9, not_before=NOW + timedelta(seconds=5)), QueueReason.BACKING_OFF),
    ],
)
def test_a_job_that_cannot_run_names_why_and_holds_back_nobody(blocked: WaitingJob, reason: QueueReason) -> None:
    decisions = schedule(view(blocked, job("next", 4), nodes=(node("n1"), node("n2"))))
    assert reasons(decisions) == {"x": reason, "next": 4}


def test_back_off_that_is_over_does_not_hold_back() -> None:
    assert schedule(view(job("a", not_before=NOW))) == [Start("a", 1)]


def test_too_large_outranks_being_behind() -> None:
    decisions = schedule(view(job("head", 4, age_s=9), job("huge", 64), reserved=(Reservation("r", 1, CPU),)))
    assert reasons(decisions)["huge"] is QueueReason.EXCEEDS_CLUSTER


def test_nothing_starts_on_a_cluster_that_does_not_answer() -> None:
    decisions = schedule(view(job("a"), job("b", depends_on=(("job_y", "QUEUED"),)), nodes=None))
    assert reasons(decisions) == {"a": QueueReason.CLUSTER_UNREACHABLE, "b": QueueReason.DEPENDENCY}


def test_workers_must_fit_on_nodes_not_only_in_the_sum() -> None:
    """Two nodes of 4 CPUs with 3 taken on each: 2 are free, but no worker of 2 CPUs has room."""
    reserved = (Reservation("r1", 3, CPU, ("n1",) * 3), Reservation("r2", 3, CPU, ("n2",) * 3))
    nodes = (node("n1"), node("n2"))
    assert reasons(schedule(view(job("a", 1, worker=Worker(cpus=2)), nodes=nodes, reserved=reserved))) == {
        "a": QueueReason.WAITING_FOR_WORKERS
    }
    assert reasons(schedule(view(job("a", 2), nodes=nodes, reserved=reserved))) == {"a": 2}


def test_dead_nodes_hold_nothing() -> None:
    assert reasons(schedule(view(job("a", 4), nodes=(node("n1", alive=False),)))) == {"a": QueueReason.EXCEEDS_CLUSTER}


def test_reservation_on_a_lost_node_moves_to_what_is_left() -> None:
    """A recovering job keeps its reservation although its node is gone."""
    reserved = (Reservation("r", 3, CPU, ("gone",) * 3),)
    assert reasons(schedule(view(job("a", 2), reserved=reserved))) == {"a": QueueReason.WAITING_FOR_WORKERS}


def test_accelerator_is_matched() -> None:
    nodes = (node("n1", 8, 2, "A100"), node("n2", 8, 2, "H100"))
    wants = Worker(cpus=1, gpus=1, accelerator="H100")
    decisions = schedule(view(job("a", 2, age_s=2, worker=wants), job("b", 1, worker=wants), nodes=nodes))
    assert reasons(decisions) == {"a": 2, "b": QueueReason.WAITING_FOR_WORKERS}
    any_gpu = Worker(cpus=1, gpus=1)
    assert reasons(schedule(view(job("a", 4, worker=any_gpu), nodes=nodes))) == {"a": 4}


def test_gpu_jobs_also_need_their_cpus() -> None:
    nodes = (node("n1", cpus=4, gpus=8),)
    decisions = schedule(view(job("a", 2, worker=Worker(cpus=3, gpus=1)), nodes=nodes))
    assert reasons(decisions) == {"a": QueueReason.EXCEEDS_CLUSTER}


def test_elastic_job_takes_the_largest_allowed_size_that_fits() -> None:
    assert schedule(view(job("a", (1, 2, 4, 8)), reserved=(Reservation("r", 1, CPU),))) == [Start("a", 2)]


def test_raylets_that_share_a_host_name_are_still_counted() -> None:
    nodes = tuple(NodeInfo(id=f"n{i}", host="127.0.0.1", cpus=2) for i in (1, 2))
    reserved = (Reservation("r", 2, CPU, ("127.0.0.1", "127.0.0.1")),)
    assert reasons(schedule(view(job("a", 3), nodes=nodes, reserved=reserved))) == {
        "a": QueueReason.WAITING_FOR_WORKERS
    }
    assert reasons(schedule(view(job("a", 2), nodes=nodes, reserved=reserved))) == {"a": 2}


def test_fitting_world_size_prefers_the_first_that_fits() -> None:
    nodes = (node("n1"),)
    assert fitting_world_size(nodes, (), CPU, (2, 4, 1)) == 2
    assert fitting_world_size(nodes, (Reservation("r", 3, CPU),), CPU, (2, 4, 1)) == 1
    assert fitting_world_size(nodes, (Reservation("r", 4, CPU),), CPU, (2, 4, 1)) is None


waiting_jobs = st.lists(
    st.builds(
        WaitingJob,
        job_id=st.uuids().map(str),
        priority=st.integers(0, 3),
        created_at=st.integers(0, 5).map(lambda s: NOW + timedelta(seconds=s)),
        world_sizes=st.sets(st.integers(1, 6), min_size=1, max_size=3).map(lambda s: tuple(sorted(s))),
        worker=st.builds(Worker, cpus=st.integers(1, 3), gpus=st.integers(0, 1)),
    ),
    max_size=8,
)
clusters = st.lists(
    st.builds(NodeInfo, id=st.uuids().map(str), cpus=st.integers(0, 8), gpus=st.integers(0, 4)), max_size=4
)


@given(waiting_jobs, clusters)
def test_every_job_gets_one_decision_and_all_starts_fit_together(jobs: list[WaitingJob], nodes: list[NodeInfo]) -> None:
    decisions = schedule(ClusterView(tuple(nodes), tuple(jobs), (), NOW))
    assert sorted(d.job_id for d in decisions) == sorted(j.job_id for j in jobs)
    by_id = {j.job_id: j for j in jobs}
    started = [(by_id[d.job_id], d.world_size) for d in decisions if isinstance(d, Start)]
    assert sum(j.worker.cpus * size for j, size in started) <= sum(n.cpus for n in nodes)
    assert sum(j.worker.gpus * size for j, size in started) <= sum(n.gpus for n in nodes)
    assert all(size in j.world_sizes for j, size in started)
    positions = [d.position for d in decisions if isinstance(d, Wait)]
    assert positions == list(range(1, len(positions) + 1))


# -- searches that run -------------------------------------------------------------------------------------------------
def search(name: str, places: int, *, began_with: int = 1, most: int = 100, per_trial: int = 1) -> RunningSearch:
    return RunningSearch(name, 1, CPU, per_trial, began_with, places, most)


def shares(seen: ClusterView, *searches: RunningSearch) -> dict[str, int]:
    return share_places(seen, schedule(seen), searches)


def test_a_search_takes_what_is_free_while_nobody_waits() -> None:
    assert shares(view(reserved=(Reservation("s", 1, CPU),)), search("s", 1)) == {"s": 4}
    assert shares(view(reserved=(Reservation("s", 1, CPU),)), search("s", 1, most=2)) == {"s": 2}
    assert shares(view(reserved=(Reservation("s", 4, CPU),)), search("s", 4)) == {"s": 4}


def test_trials_of_several_workers_are_taken_whole() -> None:
    two = node("n1", cpus=7)
    assert shares(view(nodes=(two,), reserved=(Reservation("s", 2, CPU),)), search("s", 1, per_trial=2)) == {"s": 3}


def test_what_is_let_go_in_the_same_step_is_not_free() -> None:
    assert shares(view(job("a", 2), reserved=(Reservation("s", 1, CPU),)), search("s", 1)) == {"s": 2}


def test_while_somebody_waits_a_search_falls_back_to_what_it_began_with() -> None:
    seen = view(job("a", 2), reserved=(Reservation("s", 4, CPU),))
    assert shares(seen, search("s", 4, began_with=2)) == {"s": 2}
    assert shares(seen, search("s", 1, began_with=2)) == {"s": 1}  # not more, either


def test_what_a_search_gave_up_it_takes_back_before_others_if_there_is_room() -> None:
    seen = view(job("a", 4), reserved=(Reservation("s", 1, CPU),))
    assert shares(seen, search("s", 1, began_with=2)) == {"s": 2}


def test_a_job_that_lost_its_place_is_made_room_for() -> None:
    reserved = (Reservation("s", 3, CPU), Reservation("recovering", 2, CPU))
    assert shares(view(reserved=reserved), search("s", 3)) == {"s": 1}


def test_a_job_that_waits_for_something_else_takes_no_places() -> None:
    seen = view(job("a", 9), reserved=(Reservation("s", 2, CPU),))  # larger than the cluster
    assert shares(seen, search("s", 2)) == {"s": 4}


def test_fewer_by_a_users_word_at_once() -> None:
    assert shares(view(reserved=(Reservation("s", 4, CPU),)), search("s", 4, began_with=4, most=1)) == {"s": 1}


def test_what_is_free_is_given_once() -> None:
    reserved = (Reservation("a", 1, CPU), Reservation("b", 1, CPU))
    assert shares(view(reserved=reserved), search("b", 1), search("a", 1)) == {"a": 3, "b": 1}


def test_nothing_changes_while_the_cluster_does_not_answer() -> None:
    assert shares(view(nodes=None), search("s", 1)) == {}
