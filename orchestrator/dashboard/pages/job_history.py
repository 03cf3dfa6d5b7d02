"""What happened to a job: its attempts as a timeline, and its events."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section
from orchestrator.schemas import AttemptPublic, EventPage, EventPublic, JobPublic
from orchestrator.services.history import list_events

_MAX_EVENTS = 500
_GOOD, _CALM = ("COMPLETED",), ("PAUSED", "PREEMPTED", "USER_CANCELLED")


# -- attempts ----------------------------------------------------------------------------------------------------------
def draw_attempts(_: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab: what ran, what died, what was lost, where it resumed."""
    with parts.card("Attempts"):
        update = section(_draw_timeline, lambda job: tuple((a.model_dump_json(exclude=_FAST)) for a in job.attempts))
        update(job)
    with parts.card("Ranks"):
        ranks = section(_draw_ranks, lambda job: job.attempts[-1].ranks if job.attempts else ())
        ranks(job)

    def show(job: JobPublic) -> None:
        update(job)
        ranks(job)

    return show


# What moves with every step is said in the table of ranks.
_FAST = {"ranks", "last_report_at", "to_step"}


def _draw_timeline(job: JobPublic) -> None:
    if not job.attempts:
        parts.empty(
            "It has not started yet.", "Each start on a set of workers is an attempt; a failure leads to another."
        )
        return
    with parts.tag("ol", "", "timeline"):
        for attempt in reversed(job.attempts):
            _draw_attempt(attempt)


def _draw_attempt(attempt: AttemptPublic) -> None:
    reason = attempt.exit_reason
    tone = "run" if reason is None else "good" if reason in _GOOD else "" if reason in _CALM else "bad"
    with parts.tag("li", "", tone), parts.stack("tight"):
        with parts.row("tight"):
            parts.tag("h3", f"Attempt {attempt.number}")
            parts.tag("span", reason or attempt.state.capitalize(), f"chip {tone}")
            parts.tag("span", f"{attempt.world_size} worker{'s' if attempt.world_size > 1 else ''}", "soft small")
            parts.tag("span", _lasted(attempt), "soft small")
        begun = "from the start" if not attempt.from_step else f"from the checkpoint at step {attempt.from_step:,}"
        ended = f", to step {attempt.to_step:,}" if reason is not None else ""
        parts.tag("p", f"Trained {begun}{ended}.", "num")
        if attempt.wasted_steps:
            parts.tag("p", f"{attempt.wasted_steps:,} steps after its last checkpoint are done again.", "soft")
        if attempt.exit_message:
            parts.tag("p", attempt.exit_message, "pre soft")
        failure = attempt.first_failure
        if failure is not None and failure.last_lines:
            with parts.tag("details"):
                parts.tag("summary", f"Last lines of rank {failure.rank}, which failed first")
                parts.tag("pre", "\n".join(failure.last_lines), "codebox")
        if reason is not None and attempt.advice and tone == "bad":
            parts.tag("p", f"What to do: {attempt.advice}")


def _lasted(attempt: AttemptPublic) -> str:
    if attempt.ended_at is None:
        return f"since {words.moment(attempt.created_at)} UTC"
    seconds = (attempt.ended_at - attempt.created_at).total_seconds()
    return f"{words.moment(attempt.created_at)} UTC, {words.duration(seconds)}"


def _draw_ranks(job: JobPublic) -> None:
    ranks = job.attempts[-1].ranks if job.attempts else ()
    if not ranks:
        parts.empty("No rank has reported yet.")
        return
    columns = (
        {"key": "rank", "label": "Rank"},
        {"key": "phase", "label": "Phase"},
        {"key": "step", "label": "Step", "end": True},
        {"key": "node", "label": "Node"},
        {"key": "at", "label": "Last heard of", "end": True},
    )
    with parts.tag("div", "", "scroll-x"):
        table = parts.Rows("Ranks of the newest attempt", columns)
        table.show_rows(
            [
                {
                    "id": str(rank.rank),
                    "rank": str(rank.rank),
                    "phase": rank.phase,
                    "step": f"{rank.step:,}",
                    "node": rank.node,
                    "at": {"ago": rank.at.isoformat()},
                }
                for rank in ranks[:256]
            ]
        )


# -- events ------------------------------------------------------------------------------------------------------------
def draw_events(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab: the newest events first."""
    columns = (
        {"key": "message", "label": "What happened"},
        {"key": "type", "label": "Event"},
        {"key": "by", "label": "By"},
        {"key": "at", "label": "When", "end": True},
    )
    with parts.card("Events", flush=True), parts.tag("div", "", "scroll-x"):
        table = parts.Rows("Events of the job", columns)
    frame.follow(
        ("events", job.id),
        _reader(frame, job.id),
        lambda view: table.show_rows([_row(e) for e in reversed(view.items)]),
    )
    return lambda _: None


def _row(event: EventPublic) -> dict[str, object]:
    return {
        "id": str(event.seq),
        "message": event.message or event.type,
        "type": event.type,
        "by": event.actor,
        "at": {"ago": event.at.isoformat()},
    }


def _reader(frame: Frame, job_id: str) -> Callable[[], Look[EventPage]]:
    """Reads on after the last event it has seen."""
    seen: list[EventPublic] = []

    def read() -> Look[EventPage]:
        while True:
            page = list_events(frame.services.db, job_id, seen[-1].seq if seen else 0, _MAX_EVENTS)
            seen.extend(page.items)
            del seen[:-_MAX_EVENTS]
            if len(page.items) < _MAX_EVENTS:
                break
        ended = bool(seen) and seen[-1].type in ("job.succeeded", "job.failed", "job.cancelled")
        return Look(EventPage(items=tuple(seen), next_after=0), SELDOM_S if ended else EVERY_S)

    return read
