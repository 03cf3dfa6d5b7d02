from __future__ import annotations

from datetime import UTC, datetime

import pytest

from configs.ids import attempt_id
from configs.lineage import cuts, is_in_lineage, newest, parents_of_next
from configs.wire import AttemptFile, ParentCut
from tests.configs.specs import JOB_ID


def attempt_file(number: int, parents: tuple[ParentCut, ...]) -> AttemptFile:
    return AttemptFile(
        job_id=JOB_ID,
        attempt_id=attempt_id(JOB_ID, number),
        number=number,
        spec={},
        spec_hash="",
        training_fingerprint="",
        world_size=1,
        parents=parents,
        created_at=datetime.now(UTC),
    )


def cut(**limits: int) -> tuple[ParentCut, ...]:
    return tuple(ParentCut(attempt=int(name[1:]), step=step) for name, step in limits.items())


def test_the_first_attempt_has_no_parents() -> None:
    assert parents_of_next(1, (), None) == ()
    assert cuts([attempt_file(1, ())]) == ()


def test_an_attempt_cuts_the_one_it_continues() -> None:
    assert parents_of_next(2, (), (1, 100)) == cut(a1=100)


def test_an_attempt_that_starts_anew_disowns_all_earlier_ones() -> None:
    assert parents_of_next(3, cut(a1=100), None) == cut(a1=0, a2=0)


def test_attempts_passed_over_count_nothing() -> None:
    # Attempt 2 continued attempt 1 at 100 and saved at 150, which turned out corrupt: attempt 3 goes back to 100.
    assert parents_of_next(3, cut(a1=100), (1, 100)) == cut(a1=100, a2=0)


def test_ancestors_keep_their_cuts() -> None:
    parents = parents_of_next(3, cut(a1=100), (2, 250))
    assert parents == cut(a1=100, a2=250)
    assert parents_of_next(4, parents, (1, 60)) == cut(a1=60, a2=0, a3=0)


def test_a_cut_never_moves_up() -> None:
    files = [attempt_file(3, cut(a1=60, a2=0)), attempt_file(2, cut(a1=100))]
    assert cuts(files) == cut(a1=60, a2=0)
    assert cuts(reversed(files)) == cuts(files)
    assert parents_of_next(4, cut(a1=60), (1, 100)) == cut(a1=60, a2=0, a3=0)


@pytest.mark.parametrize(
    ("attempt", "step", "counts"), [(1, 100, True), (1, 101, False), (2, 1, False), (3, 10**6, True)]
)
def test_a_zombies_late_commit_does_not_count(attempt: int, step: int, counts: bool) -> None:
    assert is_in_lineage(attempt, step, cut(a1=100, a2=0)) is counts


def test_the_newest_is_the_furthest_that_counts() -> None:
    checkpoints = [(1, 50), (1, 100), (1, 900), (2, 150), (2, 200)]
    assert newest(checkpoints, cut(a1=100)) == (2, 200)
    assert newest(checkpoints, cut(a1=100, a2=0)) == (1, 100)
    assert newest(checkpoints, cut(a1=0, a2=0)) is None
    assert newest([], ()) is None


def test_a_chain_of_attempts_keeps_one_line_of_descent() -> None:
    """Attempts 1 to 5, each resumed from the newest of what was left; late commits never win."""
    files = [attempt_file(1, ())]
    left: list[tuple[int, int]] = []
    for number, saved in [(1, (10, 20)), (2, (30,)), (3, ()), (4, (40, 50))]:
        left += [(number, step) for step in saved]
        parents = parents_of_next(number + 1, cuts(files), newest(left, cuts(files)))
        files.append(attempt_file(number + 1, parents))
        left.append((number, 1000 + number))  # a zombie commits after its successor began
    assert cuts(files) == cut(a1=20, a2=30, a3=0, a4=50)
    assert newest(left, cuts(files)) == (4, 50)
