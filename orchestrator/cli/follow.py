"""Watching a job: one progress line with its state, and what happens to it above."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orchestrator.cli import output
from orchestrator.client import Client, Unreachable
from orchestrator.schemas import EventPublic, JobPublic

POLL_S = 1.0
_PLAIN_EVERY_S = 15.0
_ABSENT_S = 60.0
_UNREMARKABLE = ("checkpoint.deleted",)
"""What `patchwork events` lists, but nobody watches for."""


class Detached(Exception):
    """The user left; the job goes on."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(
            f"Detached; the job goes on.\n"
            f"  watch it again:  patchwork show {job_id} --follow\n"
            f"  stop it:         patchwork cancel {job_id}"
        )


def follow_job(client: Client, job_id: str, out: Console) -> JobPublic:
    """Show the job's progress until it ends; returns it then, with a summary printed.

    Raises:
        Detached: Ctrl-C.
        Unreachable: the server stayed away for a minute.
    """
    try:
        job = _Live(client, job_id, out).run() if out.is_terminal else _Plain(client, job_id, out).run()
    except KeyboardInterrupt:
        raise Detached(job_id) from None
    _print_summary(job, out)
    return job


class _Watch:
    """Polls the job and its events; subclasses show them."""

    def __init__(self, client: Client, job_id: str, out: Console) -> None:
        self.client = client
        self.job_id = job_id
        self.out = out
        self._last_seq = 0
        self._last_line = ""

    def run(self) -> JobPublic:
        answered = time.monotonic()
        while True:
            try:
                job = self.client.jobs.get(self.job_id)
                for event in self.client.jobs.events(self.job_id, self._last_seq):
                    self._last_seq = event.seq
                    self._note(event)
                answered = time.monotonic()
            except Unreachable as error:
                if time.monotonic() - answered > _ABSENT_S:
                    raise
                self.show_trouble(f"{error}; trying again")
            else:
                self.show_job(job)
                if job.is_terminal:
                    return job
            time.sleep(POLL_S)

    def _note(self, event: EventPublic) -> None:
        """One line for an event; none if the one before said the same (an attempt's end and the job's, say)."""
        line = event.message.partition("\n")[0]
        if line not in self._last_line and event.type not in _UNREMARKABLE:
            self.show_event(f"[dim]{event.at.astimezone():%H:%M:%S}[/]  {escape(line)}")
        self._last_line = line

    def show_event(self, line: str) -> None:
        self.out.print(line)

    def show_trouble(self, message: str) -> None:
        self.out.print(f"[yellow]{escape(message)}[/]")

    def show_job(self, job: JobPublic) -> None:
        raise NotImplementedError


class _Plain(_Watch):
    """For files and pipes: a line when the state changes, and every so often."""

    _shown: tuple[float, str] = (0.0, "")

    def show_job(self, job: JobPublic) -> None:
        at, shown_state = self._shown
        if job.state != shown_state or time.monotonic() - at > _PLAIN_EVERY_S:
            self._shown = (time.monotonic(), job.state)
            self.out.print(f"{job.state:<10} {_position(job)}  {_measures(job)}".rstrip(), markup=False)


class _Live(_Watch):
    """For terminals: a progress bar that stays at the bottom."""

    def run(self) -> JobPublic:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[position]}"),
            TextColumn("[dim]{task.fields[measures]}[/]"),
        )
        with Progress(*columns, console=self.out, transient=True) as self._bar:
            self._task: TaskID = self._bar.add_task("", total=None, position="", measures="")
            return super().run()

    def show_event(self, line: str) -> None:
        self._bar.console.print(line)

    def show_job(self, job: JobPublic) -> None:
        running = job.progress.total_steps if job.state in ("RUNNING", "SUCCEEDED") else None
        self._bar.update(
            self._task,
            description=output.state(job.state),
            total=running,
            completed=job.progress.step,
            position=escape(_position(job)),
            measures=escape(_measures(job)),
        )


def _position(job: JobPublic) -> str:
    if job.queue is not None:
        return f"position {job.queue.position}: {job.queue.message or job.queue.reason or ''}"
    if not job.progress.total_steps:
        return job.attempts[-1].phase if job.attempts else ""
    return f"step {job.progress.step:,}/{job.progress.total_steps:,}"


def _measures(job: JobPublic) -> str:
    metrics = job.last_metrics
    parts = []
    if metrics.get("train/loss") is not None:
        parts.append(f"loss {metrics['train/loss']:.4f}")
    if metrics.get("perf/images_per_s") is not None:
        parts.append(f"{metrics['perf/images_per_s']:,.0f} images/s")
    if metrics.get("eval/top1") is not None:
        parts.append(f"top-1 {output.percent(metrics['eval/top1'])}")
    if job.progress.eta_s is not None and not job.is_terminal:
        parts.append(f"{output.duration(job.progress.eta_s)} left")
    return "  ".join(parts)


def _print_summary(job: JobPublic, out: Console) -> None:
    took = None if job.ended_at is None else (job.ended_at - job.created_at).total_seconds()
    out.print(f"{output.state(job.state)} after {output.duration(took)}. {escape(output.explanation(job))}")
    top1 = job.last_metrics.get("eval/top1")
    if top1 is not None:
        out.print(f"  top-1       {output.percent(top1)}")
    usage = job.usage
    if usage.wasted_steps or job.num_attempts > 1:
        out.print(
            f"  lost        {usage.wasted_steps} steps done again, {output.number(usage.wasted_gpu_s)} device-seconds, "
            f"in {job.num_attempts} attempts"
        )
    if job.state == "SUCCEEDED" and job.kind in ("pretrain", "finetune"):
        out.print(f"  weights     patchwork fetch {job.id}/best")
    for line in output.failure(job):
        out.print(line)
