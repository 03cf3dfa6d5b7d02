"""Typed, sortable ids. Made by the server only; safe as parts of paths and keys."""

from __future__ import annotations

import re

from ulid import ULID

_ULID = r"[0-9A-HJKMNP-TV-Z]{26}"
JOB_ID = re.compile(rf"^job_{_ULID}$")
ATTEMPT_ID = re.compile(rf"^att_({_ULID})_([0-9]{{4}})$")
IMAGE_ID_PATTERN = rf"^img_{_ULID}$"
UPLOAD_ID = re.compile(rf"^upl_{_ULID}$")
CHECKPOINT_ID = re.compile(rf"^ckpt_({_ULID})_s([0-9]{{9}})_a([0-9]{{4}})$")


def new_job_id() -> str:
    return f"job_{ULID()}"


def new_upload_id() -> str:
    return f"upl_{ULID()}"


def new_image_id() -> str:
    return f"img_{ULID()}"


def new_token_id() -> str:
    return f"tok_{ULID()}"


def new_dataset_id() -> str:
    return f"data_{ULID()}"


def attempt_id(job_id: str, number: int) -> str:
    """The id of a job's attempt `number` (from 1); also the submission id of its Ray job."""
    return f"att_{job_id.removeprefix('job_')}_{number:04d}"


def parse_attempt_id(value: str) -> tuple[str, int]:
    """Job id and attempt number.

    Raises:
        ValueError: not an attempt id.
    """
    match = ATTEMPT_ID.match(value)
    if match is None:
        raise ValueError(f"not an attempt id: {value!r}")
    return f"job_{match[1]}", int(match[2])


def checkpoint_id(job_id: str, step: int, attempt: int) -> str:
    return f"ckpt_{job_id.removeprefix('job_')}_s{step:09d}_a{attempt:04d}"


def parse_checkpoint_id(value: str) -> tuple[str, int, int]:
    """Job id, step and attempt number.

    Raises:
        ValueError: not a checkpoint id.
    """
    match = CHECKPOINT_ID.match(value)
    if match is None:
        raise ValueError(f"not a checkpoint id: {value!r}")
    return f"job_{match[1]}", int(match[2]), int(match[3])
