"""Checkpoints under failure: what is committed can be read back to the bit, and nothing else is ever believed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from configs.ids import parse_checkpoint_id
from configs.layout import checkpoints_prefix, manifest_key
from configs.reasons import ExitReason
from configs.states import Desired
from configs.wire import Manifest
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.ranks import Died, run_ranks
from tests.workers.attempts import JOB, make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts, train_directly
from workers.attempt import RankOutcome
from workers.checkpoint import read_manifest, read_weights
from workers.distributed import Ranks
from workers.shards import CheckpointCorrupt
from workers.store import AlreadyExists, Data, StorageError

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # fixtures hold many runs


def saving_spec(**parts: Any) -> Any:
    return tiny_spec(
        **({"checkpoint": {"every_steps": 2}, "schedule": {"total_steps": 5}, "zero": {"stage": 2}} | parts)
    )


def committed_steps(store: DirStore) -> list[int]:
    manifests = [key for key, _ in store.list(checkpoints_prefix(JOB)) if key.endswith("manifest.json")]
    return sorted(Manifest.model_validate_json(store.get(key)).step for key in manifests)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DirStore:
    """A finished run on two workers."""
    root = tmp_path_factory.mktemp("finished")
    spec = saving_spec(eval={"every_steps": 2, "at_end": True})
    for result in run_ranks(2, run_attempts, [Run(make_attempt(spec, 2))], str(root)):
        assert result[0].outcome.reason is ExitReason.COMPLETED
        assert result[0].outcome.checkpoint_step == 5
    return DirStore(root)


@pytest.fixture
def copied(finished: DirStore, tmp_path: Path) -> DirStore:
    """The same, to be damaged."""
    shutil.copytree(finished.root, tmp_path / "copy")
    return DirStore(tmp_path / "copy")


# -- what is in it -----------------------------------------------------------------------------------------------------
def test_cadence_and_end_are_committed(finished: DirStore) -> None:
    assert committed_steps(finished) == [2, 4, 5]


def test_manifest_says_what_it_is(finished: DirStore) -> None:
    attempt = make_attempt(saving_spec(eval={"every_steps": 2, "at_end": True}), 2)
    manifest = read_manifest(finished, saved_at(4).prefix)
    assert manifest.checkpoint_id == saved_at(4).checkpoint_id
    assert (manifest.job_id, manifest.attempt, manifest.step, manifest.position) == (JOB, 1, 4, 64)
    assert (manifest.total_steps, manifest.world_size, manifest.zero_stage) == (5, 2, 2)
    assert (manifest.optimizer, manifest.optimizer_step, manifest.skipped_steps) == ("adamw", 4, 0)
    assert manifest.training_fingerprint == attempt.training_fingerprint
    assert manifest.spec_hash == attempt.spec_hash
    assert attempt.dataset is not None
    assert manifest.data_fingerprint == attempt.dataset.fingerprint
    assert {"torch", "deepspeed", "python"} <= manifest.versions.keys()
    assert manifest.metrics.keys() == {"eval/top1", "eval/top5", "eval/loss", "eval/num_examples"}
    assert manifest.preprocess.image_size == manifest.model.image_size == (8, 8)


def test_metrics_are_those_of_the_step(finished: DirStore) -> None:
    losses = [read_manifest(finished, saved_at(step).prefix).metrics["eval/loss"] for step in (2, 4, 5)]
    assert len(set(losses)) == 3


def test_every_file_is_safetensors_or_json(finished: DirStore) -> None:
    kinds = set()
    for key, size in finished.list(""):
        if key.endswith(".json"):
            json.loads(finished.get(key))
        else:
            assert key.endswith(".safetensors"), key
            with safe_open(finished.root / key, framework="np") as file:
                names = list(file.keys())
                assert sum(file.get_tensor(name).nbytes for name in names) < size
                assert {file.get_tensor(name).dtype for name in names} == {np.dtype(np.float32)}
        kinds.add(key.rsplit(".", 1)[1])
    assert kinds == {"json", "safetensors"}


def test_manifest_names_the_slices_that_the_files_hold(finished: DirStore) -> None:
    prefix = saved_at(5).prefix
    manifest = read_manifest(finished, prefix)
    assert sorted(file.name for file in manifest.files) == [
        "shards/optimizer-00000-of-00002.safetensors",
        "shards/optimizer-00001-of-00002.safetensors",
        "shards/weights-00000-of-00002.safetensors",
        "shards/weights-00001-of-00002.safetensors",
    ]
    _, state = read_state(finished, prefix)
    owned_once = {key: torch.zeros(tensor.numel(), dtype=torch.int32) for key, tensor in state.items()}
    for shard in manifest.files:
        with safe_open(finished.root / (prefix + shard.name), framework="pt") as file:
            assert sorted(file.keys()) == sorted(piece.key for piece in shard.slices)
            for piece in shard.slices:
                run = slice(piece.start, piece.start + piece.numel)
                assert torch.equal(file.get_tensor(piece.key), state[piece.kind, piece.name].view(-1)[run])
                owned_once[piece.kind, piece.name][run] += 1
    assert all((count == 1).all() for count in owned_once.values())


# -- damage ------------------------------------------------------------------------------------------------------------
WEIGHTS = saved_at(5).prefix + "shards/weights-00001-of-00002.safetensors"
MOMENTS = saved_at(5).prefix + "shards/optimizer-00000-of-00002.safetensors"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 0x10
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap_ranks(path: Path) -> None:
    other = path.with_name(path.name.replace("-00001-", "-00000-"))
    path.write_bytes(other.read_bytes())


DAMAGES = {"flipped": flip_bit, "torn": tear, "swapped": swap_ranks, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_name(copied: DirStore, damage: str) -> None:
    DAMAGES[damage](copied.root / WEIGHTS)
    with pytest.raises(CheckpointCorrupt, match="weights-00001-of-00002") as caught:
        read_weights(copied, saved_at(5).prefix)
    assert caught.value.key == WEIGHTS


def test_damaged_moments_do_not_hinder_who_wants_weights(copied: DirStore, finished: DirStore) -> None:
    flip_bit(copied.root / MOMENTS)
    weights, _ = read_weights(copied, saved_at(5).prefix)
    expected, _ = read_weights(finished, saved_at(5).prefix)
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"step": 1', b"\x80\x04"])
def test_a_manifest_that_is_none_is_refused(copied: DirStore, content: bytes) -> None:
    copied.put(manifest_key(saved_at(5).prefix), content)
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json: not a manifest"):
        read_weights(copied, saved_at(5).prefix)


def test_without_a_manifest_there_is_no_checkpoint(copied: DirStore) -> None:
    copied.delete([manifest_key(saved_at(5).prefix)])
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json: the object is missing"):
        read_weights(copied, saved_at(5).prefix)


def test_a_manifest_that_lacks_a_shard_is_refused(copied: DirStore) -> None:
    manifest = read_manifest(copied, saved_at(5).prefix)
    files = tuple(file for file in manifest.files if file.name not in WEIGHTS)
    broken = manifest.model_copy(update={"files": files})
    copied.put(manifest_key(saved_at(5).prefix), broken.model_dump_json().encode())
    with pytest.raises(CheckpointCorrupt, match="no shard holds elements"):
        read_weights(copied, saved_at(5).prefix)


def test_resume_from_damage_ends_with_checkpoint_corrupt(copied: DirStore) -> None:
    flip_bit(copied.root / MOMENTS)
    spec = saving_spec(eval={"every_steps": 2, "at_end": True})
    run = Run(make_attempt(spec, 1, 2, resume_from=saved_at(5)))
    outcome = run_ranks(1, run_attempts, [run], str(copied.root))[0][0].outcome
    assert outcome.reason is ExitReason.CHECKPOINT_CORRUPT
    assert "optimizer-00000-of-00002" in outcome.message


# -- death and failure while saving ------------------------------------------------------------------------------------
class WrappedStore(DirStore):
    """A store that does something before a put."""

    def __init__(self, root: str, before_put: Callable[[str], None]) -> None:
        super().__init__(root)
        self._before_put = before_put

    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        self._before_put(key)
        super().put(key, data, if_none_match=if_none_match)


def dies_before_second_manifest(root: str, ranks: Ranks, reporter: RecordingReporter) -> DirStore:
    def die(key: str) -> None:
        if key == manifest_key(saved_at(4).prefix):
            os._exit(9)

    return WrappedStore(root, die)


def test_death_between_shards_and_manifest_leaves_the_checkpoint_before(tmp_path: Path, finished: DirStore) -> None:
    spec = saving_spec(eval={"every_steps": 2, "at_end": True})
    first = run_ranks(
        2, run_attempts, [Run(make_attempt(spec, 2))], str(tmp_path), dies_before_second_manifest, may_die=True
    )
    assert Died(9) in first
    store = DirStore(tmp_path)
    assert committed_steps(store) == [2]
    shards = [key for key, _ in store.list(saved_at(4).prefix) if key.endswith(".safetensors")]
    assert len(shards) == 4

    resumed = Run(make_attempt(spec, 2, 2, resume_from=saved_at(2)))
    result = run_ranks(2, run_attempts, [resumed], str(tmp_path))[0][0]
    assert result.outcome.reason is ExitReason.COMPLETED
    assert_same_bits(read_state(store, saved_at(5, 2).prefix)[1], read_state(finished, saved_at(5).prefix)[1])


def stumbles_once(root: str, ranks: Ranks, reporter: RecordingReporter) -> DirStore:
    """Each object's first put fails."""
    seen: set[str] = set()

    def stumble(key: str) -> None:
        if key not in seen:
            seen.add(key)
            raise StorageError(f"cannot write {key!r}")

    return WrappedStore(root, stumble)


class LosesAnswers(DirStore):
    """The manifest is written, and the answer lost."""

    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        is_new = not (self.root / key).exists()
        super().put(key, data, if_none_match=if_none_match)
        if if_none_match and is_new:
            raise StorageError(f"cannot write {key!r}: the answer was lost")


def loses_answers(root: str, ranks: Ranks, reporter: RecordingReporter) -> DirStore:
    return LosesAnswers(root)


def fails_on_rank_1(root: str, ranks: Ranks, reporter: RecordingReporter) -> DirStore:
    def fail(key: str) -> None:
        if ranks.rank == 1 and key.startswith(saved_at(4, 3).prefix):
            raise OSError("no space left on device")

    return WrappedStore(root, fail)


def is_written_by_another(root: str, ranks: Ranks, reporter: RecordingReporter) -> DirStore:
    """Another process of the same attempt commits first."""

    def commit_first(key: str) -> None:
        other = read_manifest(DirStore(root), saved_at(2, 1).prefix)
        if key == manifest_key(saved_at(2, 4).prefix):
            DirStore(root).put(key, other.model_dump_json().encode())

    return WrappedStore(root, commit_first)


def by_attempt(root: str, ranks: Ranks, reporter: RecordingReporter) -> DirStore:
    """run_attempts asks for a store per attempt, in order."""
    stores = (stumbles_once, loses_answers, fails_on_rank_1, is_written_by_another)
    by_attempt.calls += 1  # type: ignore[attr-defined]
    return stores[by_attempt.calls - 1](root, ranks, reporter)  # type: ignore[attr-defined]


by_attempt.calls = 0  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, list[list[Result]]]:
    root = tmp_path_factory.mktemp("troubled")
    runs = [Run(make_attempt(saving_spec(), 2, number)) for number in (1, 2, 3, 4)]
    by_rank = run_ranks(2, run_attempts, runs, str(root), by_attempt)
    return DirStore(root), [list(results) for results in zip(*by_rank, strict=True)]


def test_a_store_that_stumbles_is_tried_again(troubled: tuple[DirStore, list[list[Result]]]) -> None:
    _, results = troubled
    for result in results[0]:
        assert result.outcome.reason is ExitReason.COMPLETED
    assert results[0][0].checkpoints[-1] == saved_at(5, 1).checkpoint_id


def test_a_lost_answer_is_no_failure(troubled: tuple[DirStore, list[list[Result]]]) -> None:
    _, results = troubled
    for result in results[1]:
        assert result.outcome.reason is ExitReason.COMPLETED
    assert results[1][0].checkpoints == [saved_at(step, 2).checkpoint_id for step in (2, 4, 5)]


def test_one_rank_that_cannot_write_ends_all_at_one_step(troubled: tuple[DirStore, list[list[Result]]]) -> None:
    store, results = troubled
    first, second = (result.outcome for result in results[2])
    assert first.reason is second.reason is ExitReason.STORAGE_ERROR
    assert first.step == second.step
    assert "no space left" in second.message
    assert "another rank" in first.message
    assert not (store.root / manifest_key(saved_at(4, 3).prefix)).exists()


def test_a_manifest_of_another_process_fences_this_one(troubled: tuple[DirStore, list[list[Result]]]) -> None:
    _, results = troubled
    assert [result.outcome.reason for result in results[3]] == [ExitReason.FENCED, ExitReason.FENCED]
    assert not results[3][0].checkpoints


# -- behind the step ---------------------------------------------------------------------------------------------------
def train_with_slow_uploads(ranks: Ranks, root: str, patience_s: float) -> list[int]:
    """Rank 1's upload of step 2 lasts until training has reached step 5: the steps of what was committed."""
    reporter = RecordingReporter()

    def wait(key: str) -> None:
        until = time.monotonic() + 60.0
        while ranks.rank == 1 and key.startswith(saved_at(2).prefix) and reporter.step < 5:
            if time.monotonic() > until:
                raise AssertionError("training waits for the upload")
            time.sleep(0.001)

    store = WrappedStore(root, wait)
    outcome, _ = train_directly(ranks, slow_spec(), 1, store, reporter, patience_s=patience_s)
    assert outcome.reason is ExitReason.COMPLETED
    return [parse_checkpoint_id(checkpoint_id)[1] for checkpoint_id in reporter.checkpoints]


class Listener(RecordingReporter):
    """Counts the questions for orders, which are signs of life."""

    num_asked = 0

    def desired(self) -> Desired:
        self.num_asked += 1
        return super().desired()


def save_slowly_at_the_end(ranks: Ranks, root: str) -> RankOutcome:
    """The last save's first object is written only when this rank has given three signs of life meanwhile."""
    reporter, asked_before = Listener(), 0

    def wait(key: str) -> None:
        nonlocal asked_before
        if reporter.phases[-1] != "saving" or asked_before:
            return
        asked_before, until = reporter.num_asked, time.monotonic() + 20.0
        while reporter.num_asked < asked_before + 3:
            if time.monotonic() > until:
                raise AssertionError("a long upload at the end looks like a hang")
            time.sleep(0.01)

    spec = saving_spec(schedule={"total_steps": 1}, zero={"stage": 1})
    return train_directly(ranks, spec, 1, WrappedStore(root, wait), reporter)[0]


def test_a_rank_that_waits_for_its_last_upload_gives_signs_of_life(tmp_path: Path) -> None:
    assert run_ranks(1, save_slowly_at_the_end, str(tmp_path))[0].reason is ExitReason.COMPLETED


def slow_spec() -> Any:
    return saving_spec(schedule={"total_steps": 9}, zero={"stage": 1})


def test_training_goes_on_while_a_checkpoint_is_uploaded(tmp_path: Path) -> None:
    """Step 4's falls due while step 2's is under way: it is taken late, not dropped, and nothing waits."""
    steps = run_ranks(2, train_with_slow_uploads, str(tmp_path), 0.01)[0]
    store = DirStore(tmp_path)
    assert steps == committed_steps(store)
    assert steps[0] == 2
    assert 5 <= steps[1] <= 8
    assert steps[-1] == 9

    # What was staged at step 2 is of step 2, though the weights moved on while it was read.
    quick = tmp_path / "quick"
    run_ranks(2, run_attempts, [Run(make_attempt(slow_spec(), 2))], str(quick))
    assert committed_steps(DirStore(quick)) == [2, 4, 6, 8, 9]
    for step in (2, 9):
        assert_same_bits(
            read_state(store, saved_at(step).prefix)[1], read_state(DirStore(quick), saved_at(step).prefix)[1]
        )


# -- ranged reads ------------------------------------------------------------------------------------------------------
def test_dir_store_refuses_a_second_conditional_write(tmp_path: Path) -> None:
    store = DirStore(tmp_path)
    store.put("a/b", b"1", if_none_match=True)
    with pytest.raises(AlreadyExists):
        store.put("a/b", b"2", if_none_match=True)
    assert store.get("a/b") == b"1"
    assert list(store.list("a/")) == [("a/b", 1)]
