"""What was asked for: the resolved description, ways to ask for it again, and the plan beside what was measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import yaml

from configs.plan import Plan
from orchestrator.dashboard import parts, words
from orchestrator.dashboard.frame import Frame, section
from orchestrator.schemas import JobPublic


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    with parts.tag("div", "", "cols"):
        with parts.card("Plan and what was measured"):
            update = section(
                _draw_plan, lambda job: (job.last_metrics.get("perf/images_per_s"), job.usage, job.ended_at)
            )
            update(job)
        with parts.card("Do it again"):
            _draw_again(frame, job)
    with parts.card("Resolved description") as head:
        text = yaml.safe_dump(job.spec, sort_keys=False, allow_unicode=True, width=100)
        with head:
            parts.copy_button(text, "Copy YAML")
        parts.tag("pre", text, "codebox", tabindex=0, aria_label="Resolved description")
    return update


def _draw_plan(job: JobPublic) -> None:
    plan = Plan.model_validate(job.plan)
    speed = job.last_metrics.get("perf/images_per_s")
    took = None
    if job.started_at is not None and job.ended_at is not None:
        took = (job.ended_at - job.started_at).total_seconds()
    parts.facts(
        (
            ("Parameters", words.count(plan.parameters) if plan.parameters else ""),
            ("Operations", f"{plan.exaflops:.3g} exaFLOPs" if plan.exaflops else ""),
            ("Steps", f"{plan.steps:,}, {plan.epochs:.3g} epochs" if plan.steps and plan.epochs else ""),
            ("Batch", f"{plan.global_batch_size:,} images" if plan.global_batch_size else ""),
            ("Workers", str(plan.world_size) if plan.world_size else ""),
            ("ZeRO stage", str(plan.zero_stage) if plan.zero_stage is not None else ""),
            ("Images/s, planned", _with_band(plan.images_per_s, plan.error_band_pct)),
            ("Images/s, measured", f"{speed:,.0f}" if speed else ""),
            ("Time, planned", words.duration(plan.hours * 3600) if plan.hours else ""),
            ("Time, measured", words.duration(took) if took is not None else ""),
            ("Device time", words.duration(job.usage.gpu_seconds)),
            ("Lost to restarts", f"{job.usage.wasted_steps:,} steps" if job.usage.wasted_steps else ""),
            ("A checkpoint", words.size(plan.checkpoint_bytes) if plan.checkpoint_bytes else ""),
        )
    )


def _with_band(value: float | None, band: int | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" + (f" ± {band} %" if band else "")


def _draw_again(frame: Frame, job: JobPublic) -> None:
    address = (frame.services.settings.public_url or "http://127.0.0.1:8400").rstrip("/")
    body = json.dumps(job.submitted, separators=(",", ":"))
    curl = (
        f'curl -X POST {shlex.quote(address + "/v1/jobs")} -H "Authorization: Bearer $PATCHWORK_TOKEN" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
    spec: dict[str, Any] = job.submitted.get("spec", {})
    overrides: dict[str, Any] = job.submitted.get("overrides", {})
    command = "patchwork submit job.yaml" + "".join(f" --set {shlex.quote(f'{k}={v}')}" for k, v in overrides.items())
    with parts.row():
        parts.copy_button(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), "Copy job.yaml")
        parts.copy_button(command, "Copy as command")
        parts.copy_button(curl, "Copy as curl")
    parts.facts(
        (
            ("Command", command),
            ("Preset", job.preset or ""),
            ("Hash of the description", job.spec_hash),
            ("Training fingerprint", job.training_fingerprint),
        )
    )
