"""What may be done with a job: the buttons on top of its page, and their dialogs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from orchestrator.dashboard import parts
from orchestrator.dashboard.frame import Frame, url
from orchestrator.schemas import CheckpointPublic, JobEdit, JobFork, JobPublic
from orchestrator.services import edits, forks, jobs, submission
from orchestrator.services.auth import Actor
from orchestrator.services.checkpoints import list_checkpoints
from orchestrator.services.problems import Invalid
from orchestrator.services.submission import Submitted


def draw(frame: Frame, job: JobPublic) -> None:
    """Buttons for what is allowed now; none for whoever may only look."""
    if not frame.may_write:
        return
    db = frame.services.db
    with parts.row("tight"):
        if "pause" in job.allowed_actions:
            parts.button(
                "Pause", lambda: frame.act(lambda actor: jobs.pause_job(db, actor, job.id), "A pause was asked for.")
            )
        if "resume" in job.allowed_actions:
            parts.button(
                "Resume", lambda: frame.act(lambda actor: jobs.resume_job(db, actor, job.id), "It was resumed."), "main"
            )
        if "retry" in job.allowed_actions:
            retry = partial(submission.retry_job, db, job_id=job.id, resume=True, key=None)
            parts.button("Retry", lambda: _make(frame, lambda actor: retry(actor=actor)), "main")
        if job.kind != "import":
            parts.button("Fork", lambda: _open_fork(frame, job))
        parts.button("Edit", lambda: _open_edit(frame, job.id))
        if "cancel" in job.allowed_actions:
            parts.button("Cancel", lambda: _open_cancel(frame, job), "danger")


async def _make(frame: Frame, work: Callable[[Actor], Submitted]) -> None:
    made = await frame.act(work)
    if made is not None:
        frame.go(url(f"/jobs/{made.job_id}"))


def _open_cancel(frame: Frame, job: JobPublic) -> None:
    box, body = parts.dialog("Cancel this job?")
    with body:
        parts.tag("p", job.name, "strong wrap")
        saves = "It saves a checkpoint first; a retry goes on from there." if job.attempts else "It has not started."
        parts.tag("p", saves)

        async def cancel() -> None:
            box.close()
            work = partial(jobs.cancel_job, frame.services.db, job_id=job.id)
            await frame.act(lambda actor: work(actor=actor), "Cancellation was asked for.")

        with parts.row():
            parts.button("Cancel the job", cancel, "danger")
            parts.button("Keep it", box.close)
    box.open()


async def _open_edit(frame: Frame, job_id: str) -> None:
    job = await frame.read(lambda: jobs.get_job(frame.services.db, job_id))
    box, body = parts.dialog("Priority and labels")
    with body:
        priority = parts.text_field("Priority", str(job.priority), help="0 to 100; higher ones start first.")
        text = "\n".join(f"{key}={value}" for key, value in job.labels.items())
        labels = parts.text_field("Labels", text, rows=4, help="One key=value in each line.")

        async def save() -> None:
            def work(actor: Actor) -> JobPublic:
                wanted = JobEdit(
                    priority=None if int(priority.value) == job.priority else int(priority.value),
                    labels=_pairs(labels.value),
                )
                return edits.edit_job(frame.services.db, actor, job.id, wanted, job.etag)

            number = priority.value.strip()
            wrong = not number.isdigit() or int(number) > 100
            priority.say_wrong("Give a whole number from 0 to 100." if wrong else "")
            bad = next((line for line in labels.value.splitlines() if line.strip() and "=" not in line), None)
            labels.say_wrong(f"Expected key=value: {bad}" if bad else "")
            if not wrong and not bad and await frame.act(work, "Saved.") is not None:
                box.close()

        with parts.row():
            parts.button("Save", save, "main")
            parts.button("Close", box.close)
    box.open()


async def _open_fork(frame: Frame, job: JobPublic) -> None:
    found = await frame.read(lambda: list_checkpoints(frame.services.db, job.id).items)
    box, body = parts.dialog("Fork this job")
    with body:
        parts.tag("p", "A new job with this one's description and your changes.", "soft")
        name = parts.text_field("Name", f"{job.name}-fork"[:128])
        start = parts.choice("Start from", {"": "The beginning"} | _choices(found), "")
        changes = parts.text_field(
            "Changes",
            rows=5,
            placeholder="optim.lr=1e-4\nresources.workers=4",
            help="One key=value in each line, over the description. To go on from a checkpoint, what is learned must "
            "stay as it is: workers, ZeRO, checkpoints and evaluation may change.",
        )

        async def fork() -> None:
            def work(actor: Actor) -> Submitted:
                overrides = _pairs(changes.value)
                wanted = JobFork(checkpoint=start.value or None, overrides=overrides, name=name.value.strip() or None)
                return forks.fork_job(frame.services.db, actor, job.id, wanted, None)

            bad = next((line for line in changes.value.splitlines() if line.strip() and "=" not in line), None)
            changes.say_wrong(f"Expected key=value: {bad}" if bad else "")
            if not bad:
                await _make(frame, work)

        with parts.row():
            parts.button("Submit the fork", fork, "main")
            parts.button("Close", box.close)
    box.open()


def _choices(found: tuple[CheckpointPublic, ...]) -> dict[str, str]:
    return {
        checkpoint.id: f"Step {checkpoint.step:,} {' and '.join(checkpoint.aliases)}".strip()
        for checkpoint in found
        if checkpoint.available
    }


def _pairs(text: str) -> dict[str, str]:
    """Lines of key=value."""
    pairs = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, equals, value = line.partition("=")
        if not equals:
            raise Invalid(f"Expected key=value, not {line!r}.")
        pairs[key.strip()] = value.strip()
    return pairs
