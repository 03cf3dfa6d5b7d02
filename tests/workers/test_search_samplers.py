"""Samplers and the book: asked and told once more in the recorded order, they give the same settings again."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from configs.load import parse_spec
from configs.search_wire import SearchState, TrialCreate, TrialRecord
from configs.spec import SearchJob
from configs.states import JobState
from workers.search.book import Book
from workers.search.samplers import make_sampler

SPACE: dict[str, Any] = {
    "optim.lr": {"type": "log_uniform", "low": 1e-4, "high": 1.0},
    "optim.name": {"type": "choice", "values": ["adamw", "sgd"]},
    "optim.momentum": {"type": "uniform", "low": 0.0, "high": 0.9, "when": {"optim.name": "sgd"}},
    "model.drop_path": {"type": "uniform", "low": 0.0, "high": 0.4, "step": 0.1},
    "data.augment.randaugment.num_ops": {"type": "int", "low": 1, "high": 5},
}


def make_search(**fields: Any) -> SearchJob:
    raw = {
        "kind": "search",
        "base": {"kind": "pretrain"},
        "space": SPACE,
        "budget": {"trials": 24},
        "seed": 7,
        **fields,
    }
    spec = parse_spec(raw)
    assert isinstance(spec, SearchJob)
    return spec


class Rows:
    """What the control plane would hold of a search, without one."""

    def __init__(self, search: SearchJob) -> None:
        self.search = search
        self.trials: dict[int, TrialRecord] = {}

    def state(self) -> SearchState:
        # Through JSON, as it comes over the network.
        text = SearchState(
            job_id="job_x", num_trials=self.search.budget.trials, trials=tuple(self.trials.values())
        ).model_dump_json()
        return SearchState.model_validate_json(text)

    def create(self, asked: TrialCreate) -> TrialRecord:
        assert asked.number not in self.trials
        fields = json.loads(asked.model_dump_json())
        record = TrialRecord(job_id=f"job_{asked.number}", state=JobState.RUNNING, **fields)
        self.trials[asked.number] = record
        return record

    def end(self, number: int, state: JobState = JobState.SUCCEEDED) -> TrialRecord:
        """Ends with a value that its setting alone decides; none if it failed."""
        record = self.trials[number]
        told = max((t.told or 0 for t in self.trials.values()), default=0) + 1
        curve = () if state is JobState.FAILED else ((10, value_of(record)),)
        record = record.model_copy(update={"state": state, "told": told, "curve": curve})
        self.trials[number] = record
        return record


def value_of(trial: TrialRecord) -> float:
    return random.Random(json.dumps(trial.params, sort_keys=True)).random()


def run_search(search: SearchJob, concurrency: int, crash_at: set[int], seed: int = 0) -> list[TrialRecord]:
    """The whole search, simulated: before each of its turns in `crash_at` the driver is another one. Which trial ends
    first is decided by `seed`; each seventh fails and each fifth is stopped."""
    rows, chance = Rows(search), random.Random(seed)
    book, turn = Book(search, rows.state()), 0
    while True:
        if turn in crash_at:
            book = Book(search, rows.state())
        turn += 1
        running = book.unfinished()
        if len(running) < concurrency and (asked := book.next_trial()) is not None:
            book.note(rows.create(asked))
            continue
        if not running:
            return list(rows.trials.values())
        number = chance.choice(running).number
        state = JobState.FAILED if number % 7 == 0 else JobState.CANCELLED if number % 5 == 0 else JobState.SUCCEEDED
        book.note(rows.end(number, state))


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_driver_that_begins_again_goes_on_with_the_same_settings(algorithm: str, concurrency: int) -> None:
    search = make_search(algorithm=algorithm)
    undisturbed = run_search(search, concurrency, crash_at=set())
    disturbed = run_search(search, concurrency, crash_at=set(range(1, 48, 3)))
    assert [t.params for t in disturbed] == [t.params for t in undisturbed]
    assert [t.number for t in disturbed] == list(range(1, 25))


def test_another_seed_gives_other_settings() -> None:
    first, second = (make_sampler(make_search(seed=seed)).ask(0) for seed in (1, 2))
    assert first != second


def test_tpe_finds_better_settings_than_chance() -> None:
    """On a bowl in log(lr): of its last settings most lie nearer to the bottom than random ones do."""

    def distance(search: SearchJob) -> float:
        sampler, found = make_sampler(search), []
        import math

        from workers.search.samplers import Outcome

        for index in range(30):
            setting = sampler.ask(index)
            assert setting is not None
            away = abs(math.log10(setting["optim.lr"]) + 2.0)
            sampler.tell(index, setting, Outcome(-away))
            found.append(away)
        return sum(found[15:]) / 15

    space = {"optim.lr": SPACE["optim.lr"]}
    assert distance(make_search(space=space, algorithm="tpe")) < 0.6 * distance(make_search(space=space))


def test_conditional_keys_come_only_where_their_condition_holds() -> None:
    for algorithm in ("random", "tpe"):
        sampler = make_sampler(make_search(algorithm=algorithm))
        settings = [sampler.ask(index) for index in range(20)]
        assert {s["optim.name"] for s in settings if s} == {"adamw", "sgd"}
        assert all(("optim.momentum" in s) == (s["optim.name"] == "sgd") for s in settings if s is not None)


def test_a_setting_is_tried_so_many_times() -> None:
    trials = run_search(make_search(repeats=3), 2, crash_at={5, 6, 17})
    assert len(trials) == 24
    assert sorted((t.setting, t.repeat) for t in trials) == [(s, r) for s in range(8) for r in range(3)]
    assert len({json.dumps(t.params, sort_keys=True) for t in trials}) == 8


def test_a_grid_ends_when_every_setting_was_tried() -> None:
    space = {"optim.name": SPACE["optim.name"], "model.drop_path": SPACE["model.drop_path"]}
    trials = run_search(make_search(space=space, algorithm="grid"), 2, crash_at={3})
    assert len(trials) == 10
    assert len({json.dumps(t.params) for t in trials}) == 10


def test_settings_that_were_never_ended_are_tried_again() -> None:
    """A search that goes on from a cancelled one has no rows of the trials that were cancelled with it."""
    search = make_search(algorithm="tpe")
    whole = run_search(search, 1, crash_at=set())
    rows = Rows(search)
    rows.trials = {t.number: t for t in whole[:9] if t.number != 4}
    book = Book(search, rows.state())
    asked = book.next_trial()
    assert asked is not None
    assert (asked.number, asked.setting, asked.params) == (10, 3, whole[3].params)


def test_what_was_tried_counts_where_the_sampler_would_try_something_else() -> None:
    search = make_search(algorithm="tpe")
    rows = Rows(search)
    for trial in run_search(search, 1, crash_at=set())[:8]:
        rows.trials[trial.number] = trial.model_copy(update={"params": {**trial.params, "optim.lr": 0.5}})
    book = Book(search, rows.state())
    assert all(t.params["optim.lr"] == 0.5 for t in book.trials.values())
    assert book.next_trial() is not None


def test_the_final_run_is_the_best_setting_once() -> None:
    search = make_search(final={}, budget={"trials": 4})
    rows = Rows(search)
    rows.trials = {t.number: t for t in run_search(search, 1, crash_at=set())}
    best = max((t for t in rows.trials.values() if t.state is JobState.SUCCEEDED), key=value_of)
    book = Book(search, rows.state())
    final = book.final_trial()
    assert final is not None
    assert (final.role, final.params, final.number) == ("final", best.params, 5)
    book.note(rows.create(final))
    assert book.final_trial() is None


def test_a_trial_that_ends_without_the_metric_says_that_none_will_have_it() -> None:
    book = Book(make_search(), SearchState(job_id="job_x", num_trials=24))
    ended = TrialRecord(number=3, job_id="job_3", state=JobState.SUCCEEDED, setting=2, params={})
    assert book.why_metric_is_missing(ended) == ("Trial 3 came to its end without a value of eval/top1: none will.")
    assert book.why_metric_is_missing(ended.model_copy(update={"has_metric": True})) is None
    for state in (JobState.FAILED, JobState.CANCELLED, JobState.RUNNING):
        assert book.why_metric_is_missing(ended.model_copy(update={"state": state})) is None
