"""The object store refuses, hangs, loses answers, or holds what nobody wrote (rows 3, 25 to 31 of docs/faults.md)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from configs.layout import checkpoint_prefix, manifest_key
from tests.faults.scene import (
    EVERY,
    Scene,
    assert_exact,
    assert_nothing_left,
    direct,
    is_running,
    objects,
    reasons,
)
from tests.stack.jobs import final_weights, finished, until

pytestmark = pytest.mark.stack

SHARDS = r"/checkpoints/step-0000000{step}-.*/shards/.*\.safetensors"
MANIFESTS = r"/checkpoints/.*/manifest\.json"
DENIED = (
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied.</Message>"
    b"<Resource>/</Resource><RequestId>1</RequestId></Error>"
)
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message>"
    b"<Resource>/</Resource><RequestId>1</RequestId></Error>"
)


def shards(step: int) -> str:
    return SHARDS.format(step=step)


def test_row_3_killed_while_a_shard_is_uploaded(scene: Scene) -> None:
    with scene.store.rule("hold", "PUT", shards(2 * EVERY), after_bytes=1000, times=1) as rule:
        job = scene.submit(schedule__total_steps=60)
        assert rule.hit.wait(60)
        os.kill(scene.pid_of_rank(job.id, 1), signal.SIGKILL)
    job = finished(scene.client, job.id)
    assert job.attempts[0].exit_reason == "WORKER_LOST"
    assert job.attempts[1].from_step == EVERY, "half a checkpoint is none"
    assert_exact(scene, job)
    assert_nothing_left(scene, job)
    # What the dead attempt left of it is swept with the job's end.
    prefix = checkpoint_prefix(job.id, 2 * EVERY, 1)
    until("swept", lambda: not objects(scene, prefix), 30)


def test_row_25_every_third_request_fails(scene: Scene) -> None:
    with (
        scene.store.rule(
            "answer", "PUT|GET|POST", "/checkpoints/", status=503, body=SLOW_DOWN, probability=0.2
        ) as slow,
        scene.store.rule("answer", "PUT|GET|POST", "/checkpoints/", status=500, probability=0.15),
    ):
        job = finished(scene.client, scene.submit().id)
    assert slow.hits
    assert reasons(job.attempts) == ["COMPLETED"]
    assert_exact(scene, job)


def test_row_26_a_store_that_accepts_and_never_answers(scene: Scene) -> None:
    with scene.store.rule("hang", "PUT", shards(EVERY), times=2) as rule:
        job = finished(scene.client, scene.submit().id)
        assert rule.hits == 2
    assert reasons(job.attempts) == ["COMPLETED"], "training goes on, the upload is tried again"
    assert_exact(scene, job)


def test_row_27_the_answer_to_the_commit_is_lost(scene: Scene) -> None:
    with scene.store.rule("lose", "PUT", MANIFESTS) as rule:
        job = scene.submit()
        assert rule.hit.wait(60)
        rule.times = rule.hits  # this one only: what comes again must find its own manifest
        job = finished(scene.client, job.id)
    assert reasons(job.attempts) == ["COMPLETED"], "its own manifest does not fence it"
    assert_exact(scene, job)


def test_row_28_keys_that_are_refused_in_the_middle_of_a_run(scene: Scene) -> None:
    with scene.store.rule("answer", "PUT|POST", shards(2 * EVERY), status=403, body=DENIED) as rule:
        job = scene.client.jobs.wait(scene.submit().id, 90, poll_s=0.2)
        assert rule.hits <= 4, "no storm: both ranks ask once for each of their two files at most"
    assert (job.state, job.reason, job.num_attempts) == ("FAILED", "STORAGE_REFUSED", 1)
    assert "AccessDenied" in job.message
    assert job.advice
    assert "keys" in job.advice
    assert_nothing_left(scene, job)

    again = finished(scene.client, scene.client.jobs.retry(job.id).id)
    assert again.attempts[0].from_step == EVERY
    assert_same_weights(scene, again.id)


def flip(body: bytes) -> bytes:
    return body[:-5] + bytes([body[-5] ^ 0x40]) + body[-4:]


def damage_flipped(s3: Any, bucket: str, prefix: str) -> str:
    key = f"{prefix}shards/weights-00001-of-00002.safetensors"
    s3.put_object(Bucket=bucket, Key=key, Body=flip(s3.get_object(Bucket=bucket, Key=key)["Body"].read()))
    return key


def damage_torn(s3: Any, bucket: str, prefix: str) -> str:
    key = f"{prefix}shards/optimizer-00000-of-00002.safetensors"
    body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.put_object(Bucket=bucket, Key=key, Body=body[: len(body) // 2])
    return key


def damage_swapped(s3: Any, bucket: str, prefix: str) -> str:
    keys = [f"{prefix}shards/weights-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    bodies = [s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
    for key, body in zip(keys, reversed(bodies), strict=True):
        s3.put_object(Bucket=bucket, Key=key, Body=body)
    return keys[0]


def damage_missing(s3: Any, bucket: str, prefix: str) -> str:
    key = f"{prefix}shards/weights-00000-of-00002.safetensors"
    s3.delete_object(Bucket=bucket, Key=key)
    return key


def damage_manifest(s3: Any, bucket: str, prefix: str) -> str:
    key = manifest_key(prefix)
    body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.put_object(Bucket=bucket, Key=key, Body=body[:200])
    return key


@pytest.mark.parametrize("damage", [damage_flipped, damage_torn, damage_swapped, damage_missing, damage_manifest])
def test_rows_29_30_31_a_damaged_checkpoint_is_passed_over(
    scene: Scene, damage: Callable[[Any, str, str], str]
) -> None:
    # Frozen beyond its second checkpoint, killed once that is damaged.
    fired = scene.arm("loop.step", f"stop rank=1 step={2 * EVERY + 5}")
    job = scene.submit()
    until("frozen", fired.exists, 60)
    victim = scene.pid_of_rank(job.id, 1)
    found = scene.checkpoint_at(job.id, 2 * EVERY)
    s3, bucket = direct(scene)
    key = damage(s3, bucket, checkpoint_prefix(job.id, found.step, found.attempt))
    os.kill(victim, signal.SIGKILL)
    until("dead", lambda: not is_running(victim), 20)

    job = finished(scene.client, job.id)

    assert job.attempts[0].exit_reason == "WORKER_LOST"
    assert job.attempts[-1].from_step == EVERY, "the checkpoint before it is used"
    warnings = scene.messages(job.id, "checkpoint.invalid")
    assert found.id in warnings, scene.messages(job.id)
    told = warnings + "".join(attempt.exit_message for attempt in job.attempts)
    assert key.rsplit("/", 1)[-1] in told or "some of its files are missing or have another size" in told
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def assert_same_weights(scene: Scene, job_id: str) -> None:
    weights = final_weights(scene.client, job_id)
    assert all(np.array_equal(weights[key], value) for key, value in scene.golden.weights.items())
