"""What a search reports: ranking, importances, picture."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib.image

from configs.search_results import best_trial, by_setting, ranked
from configs.search_wire import SearchReport, TrialRecord
from configs.states import JobState
from tests.workers.test_search_samplers import make_search
from workers.search.report import draw, make_report, write_report
from workers.search.samplers import make_sampler
from workers.store import NotFound


def trial(number: int, value: float | None, state: JobState = JobState.SUCCEEDED, **fields: Any) -> TrialRecord:
    values: dict[str, Any] = {"setting": number - 1, "params": {"optim.lr": 0.01 * number}} | fields
    curve = () if value is None else ((10, value / 2), (20, value))
    return TrialRecord(number=number, job_id=f"job_{number}", state=state, curve=curve, gpu_seconds=2.0, **values)


def test_complete_settings_come_before_stopped_ones() -> None:
    search = make_search()
    trials = [trial(1, 0.5), trial(2, 0.9, JobState.CANCELLED), trial(3, 0.7), trial(4, None, JobState.FAILED)]
    assert [r.trials[0].number for r in ranked(search, trials)] == [3, 1, 2]
    best = best_trial(search, trials)
    assert best is not None
    assert best.number == 3
    assert best_trial(search, [trial(4, None, JobState.FAILED)]) is None


def test_settings_are_ranked_by_the_mean_of_their_repeats() -> None:
    search = make_search(repeats=2)
    values = [(0, 0.9), (0, 0.1), (1, 0.6), (1, 0.7)]
    trials = [trial(n, v, setting=s, params={"optim.lr": s + 0.1}) for n, (s, v) in enumerate(values, start=1)]
    best, other = ranked(search, trials)
    assert best.setting == 1
    assert best.mean is not None
    assert math.isclose(best.mean, 0.65)
    assert other.std is not None
    assert math.isclose(other.std, 0.8 / math.sqrt(2))
    assert best_trial(search, trials) == trials[3]


def test_a_lower_loss_is_the_better_one() -> None:
    best = best_trial(make_search(metric="eval/loss"), [trial(1, 0.5), trial(2, 0.2)])
    assert best is not None
    assert best.number == 2


def test_every_member_of_a_population_is_ranked() -> None:
    search = make_search(
        scheduler={"name": "pbt", "interval_steps": 10},
        space={"optim.lr": {"type": "log_uniform", "low": 1e-3, "high": 1}},
    )
    trials = [trial(1, 0.5), trial(2, 0.2, JobState.CANCELLED), trial(3, 0.6, setting=1, replaces=2, parent=1)]
    assert len(by_setting(search, trials)) == 3
    best = best_trial(search, trials)
    assert best is not None
    assert best.number == 3


def searched(num_trials: int, value: Any, **fields: Any) -> tuple[Any, list[TrialRecord]]:
    search = make_search(**fields)
    sampler = make_sampler(search)
    settings = [sampler.ask(index) for index in range(num_trials)]
    return search, [trial(n, value(s), params=s) for n, s in enumerate(settings, start=1)]


def test_what_matters_is_found_important() -> None:
    search, trials = searched(24, lambda s: -abs(math.log10(s["optim.lr"]) + 2.0))
    report = make_report("job_x", search, trials)
    assert report is not None
    assert math.isclose(sum(report.importances.values()), 1.0, abs_tol=1e-4)
    assert "optim.momentum" not in report.importances, "not every setting has it"
    assert max(report.importances, key=lambda key: report.importances[key]) == "optim.lr"
    assert report.states == {"SUCCEEDED": 24}
    assert report.gpu_seconds == 48.0


def test_where_nothing_can_be_told_nothing_is() -> None:
    for count, value in ((24, lambda _: 0.5), (3, lambda s: s["optim.lr"])):
        search, trials = searched(count, value)
        report = make_report("job_x", search, trials)
        assert report is not None
        assert report.importances == {}


def test_the_picture_is_drawn_for_any_search() -> None:
    cases = [
        searched(12, lambda s: s["optim.lr"]),
        searched(1, lambda s: s["optim.lr"]),
        searched(12, lambda s: s["optim.lr"], metric="eval/loss"),
    ]
    search, trials = cases[0]
    cases.append((search, [*trials[:3], trial(4, None, JobState.FAILED), trial(5, 0.1, role="final")]))
    for search, trials in cases:
        report = make_report("job_x", search, trials)
        assert report is not None
        image = matplotlib.image.imread(io.BytesIO(draw(search, report, trials)))
        assert image.shape[:2] == (900, 1200)
        assert image[..., :3].std() > 0.05


class Folder:
    """The two calls of a store that a report makes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        self.files[key] = data

    def get(self, key: str) -> bytes:
        if key not in self.files:
            raise NotFound(key)
        return self.files[key]


def test_both_files_lie_under_the_searchs_job() -> None:
    job_id = "job_01JD3Q8Z6M0000000000000000"
    search, trials = searched(6, lambda s: s["optim.lr"])
    store: Any = Folder()
    best = write_report(store, job_id, search, trials)
    assert set(store.files) == {f"jobs/{job_id}/search/report.json", f"jobs/{job_id}/search/report.png"}
    read = SearchReport.model_validate_json(store.get(f"jobs/{job_id}/search/report.json"))
    assert read.best == best
    assert [s.mean for s in read.settings] == sorted((s.mean for s in read.settings), reverse=True)
    assert write_report(store, job_id, search, [trial(1, None, JobState.FAILED)]) is None
