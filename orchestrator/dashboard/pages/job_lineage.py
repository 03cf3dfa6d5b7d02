"""What a job came of and what came of it, as a graph and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.schemas import JobPublic
from orchestrator.services.jobs import get_job
from orchestrator.services.lineage import read_lineage
from orchestrator.view_schemas import LineageLink, LineagePublic

_HOW = {"retry": "is a retry of", "fork": "goes on from", "weights": "starts from the weights of"}
_TONES = {"busy": "run", "wait": "", "off": ""}
"""States have more tones than the graph has colours."""


def draw(frame: Frame, job: JobPublic) -> None:
    """A card that follows the job's family."""
    with parts.card("Lineage"):
        chart = parts.Chart("Jobs that came of one another")
        told = section(lambda view: _tell(view, job.id))

    def show(view: LineagePublic) -> None:
        parts.show(chart.box, len(view.jobs) > 1)
        if len(view.jobs) > 1:
            chart.draw(_graph(view, job.id))
        told(view)

    def read() -> Look[LineagePublic]:
        ended = get_job(frame.services.db, job.id).is_terminal
        return Look(read_lineage(frame.services.db, job.id), SELDOM_S if ended else 5 * EVERY_S)

    frame.follow(("lineage", job.id), read, show)


def _tell(view: LineagePublic, job_id: str) -> None:
    """The same for whoever does not see the graph."""
    names = {job.id: job.name for job in view.jobs}
    if len(view.jobs) == 1:
        parts.tag("p", "It began with weights of its own, and nothing was made of it yet.", "soft")
        return
    with parts.tag("ul", "", "plain-list", aria_label="Who came of whom"):
        for link in view.links:
            with parts.tag("li", "", "row tight"):
                _name(link.target, names, job_id)
                parts.tag("span", _HOW[link.how], "soft")
                _name(link.source, names, job_id)
                parts.tag("span", _at(link), "soft")
    if not view.complete:
        parts.tag("p", f"There are more; these are the nearest {len(view.jobs)}.", "soft")


def _name(job: str, names: Mapping[str, str], job_id: str) -> None:
    if job == job_id:
        parts.tag("span", names[job], "strong wrap")
    else:
        parts.link(names[job], url(f"/jobs/{job}"), "wrap")


def _at(link: LineageLink) -> str:
    """Where in the source's training; empty where nobody knows yet."""
    return "" if link.checkpoint is None else f"at step {int(link.checkpoint.split('_')[2][1:]):,}"


def _graph(view: LineagePublic, job_id: str) -> dict[str, Any]:
    places = _places(view)
    nodes = [
        {
            "id": job.id,
            "name": job.name,
            "sub": f"{job.kind}, {words.STATE_WORDS.get(job.state, job.state).lower()}, step {job.step:,}",
            "tone": _TONES.get(tone, tone),
            "href": url(f"/jobs/{job.id}", tab="checkpoints"),
            "here": job.id == job_id,
            "x": places[job.id][0],
            "y": places[job.id][1],
        }
        for job, tone in ((job, words.STATE_TONES.get(job.state, "off")) for job in view.jobs)
    ]
    links = [
        {"source": x.source, "target": x.target, "how": x.how, "text": f"{_HOW[x.how]} it {_at(x)}"} for x in view.links
    ]
    return {"kind": "graph", "nodes": nodes, "links": links, "size": len(nodes)}


def _places(view: LineagePublic) -> dict[str, tuple[float, float]]:
    """Where each job stands: to the right of all that it came of, those of one column below one another."""
    sources: dict[str, list[str]] = defaultdict(list)
    for link in view.links:
        sources[link.target].append(link.source)
    columns: dict[str, int] = {}
    # The oldest first: what a job came of was there before it.
    for job in view.jobs:
        columns[job.id] = max((columns.get(source, -1) for source in sources[job.id]), default=-1) + 1
    members: dict[int, list[str]] = defaultdict(list)
    for job_id, column in columns.items():
        members[column].append(job_id)
    return {
        job_id: (float(column), number - (len(column_jobs) - 1) / 2)
        for column, column_jobs in members.items()
        for number, job_id in enumerate(column_jobs)
    }
