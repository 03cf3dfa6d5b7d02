"""Where things lie in the object store. Both sides use these functions and no other spelling.

<prefix>jobs/<job>/
    attempts/0003.json                      what the attempt was given (AttemptFile)
    attempts/0003/exit.json                 how it ended (ExitFile), written by its driver
    attempts/0003/logs/<stream>/000007.jsonl   stream: driver, rank-00000, …
    checkpoints/step-000120000-a0003/
        shards/…                            safetensors; see Manifest
        shards/rank-00000-of-00002.json     what rank 0 of 2 wrote, and what it measured (RankFiles)
        manifest.json                       written last, If-None-Match: *; without it there is no checkpoint
    exports/<format>/…                      what an export job made
    tensorboard/events.out.tfevents.0003.000007   its metrics for TensorBoard: attempt and part
    report.json                             what an evaluate job found (EvaluationReport)
    pictures/<name>.png, <name>.npz         what an inspect job drew, and its numbers
    pictures/index.json                     written last (PictureIndex): names the files
    search/report.json, search/report.png   what a search found (SearchReport), and pictures of it
<prefix>uploads/<upload>/file               a weights file on its way to an import job
<prefix>images/<image>                     an image that was uploaded, for inspect jobs; deleted after a while
<prefix>datasets/<name>/<fingerprint>.json  index of a registered data set (DatasetIndex)
"""

from __future__ import annotations

from configs.ids import parse_attempt_id


def job_prefix(job_id: str) -> str:
    return f"jobs/{job_id}/"


def attempts_prefix(job_id: str) -> str:
    return f"{job_prefix(job_id)}attempts/"


def attempt_key(attempt_id: str) -> str:
    job_id, number = parse_attempt_id(attempt_id)
    return f"{attempts_prefix(job_id)}{number:04d}.json"


def exit_key(attempt_id: str) -> str:
    job_id, number = parse_attempt_id(attempt_id)
    return f"{attempts_prefix(job_id)}{number:04d}/exit.json"


def logs_prefix(attempt_id: str) -> str:
    job_id, number = parse_attempt_id(attempt_id)
    return f"{attempts_prefix(job_id)}{number:04d}/logs/"


def rank_stream(rank: int) -> str:
    return f"rank-{rank:05d}"


def log_chunk_key(attempt_id: str, stream: str, chunk: int) -> str:
    """`chunk` counts from 0 without gaps, so a reader follows by asking for the next one."""
    return f"{logs_prefix(attempt_id)}{stream}/{chunk:06d}.jsonl"


def checkpoints_prefix(job_id: str) -> str:
    return f"{job_prefix(job_id)}checkpoints/"


def checkpoint_prefix(job_id: str, step: int, attempt: int) -> str:
    return f"{checkpoints_prefix(job_id)}step-{step:09d}-a{attempt:04d}/"


def manifest_key(checkpoint_prefix: str) -> str:
    return f"{checkpoint_prefix}manifest.json"


def rank_files_key(checkpoint_prefix: str, rank: int, world_size: int) -> str:
    return f"{checkpoint_prefix}shards/rank-{rank:05d}-of-{world_size:05d}.json"


def export_prefix(job_id: str, fmt: str) -> str:
    return f"{job_prefix(job_id)}exports/{fmt}/"


def report_key(job_id: str) -> str:
    return f"{job_prefix(job_id)}report.json"


def pictures_prefix(job_id: str) -> str:
    return f"{job_prefix(job_id)}pictures/"


def picture_index_key(job_id: str) -> str:
    return f"{pictures_prefix(job_id)}index.json"


def search_report_key(job_id: str) -> str:
    return f"{job_prefix(job_id)}search/report.json"


def search_picture_key(job_id: str) -> str:
    return f"{job_prefix(job_id)}search/report.png"


def tensorboard_prefix(job_id: str) -> str:
    return f"{job_prefix(job_id)}tensorboard/"


def event_file_key(job_id: str, attempt: int, part: int) -> str:
    """TensorBoard reads the files of a folder in the order of their names, and knows them by `tfevents`."""
    return f"{tensorboard_prefix(job_id)}events.out.tfevents.{attempt:04d}.{part:06d}"


def uploads_prefix() -> str:
    return "uploads/"


def upload_key(upload_id: str) -> str:
    return f"{uploads_prefix()}{upload_id}/file"


def image_key(image_id: str) -> str:
    return f"images/{image_id}"


def dataset_index_key(name: str, fingerprint: str) -> str:
    return f"datasets/{name}/{fingerprint}.json"
