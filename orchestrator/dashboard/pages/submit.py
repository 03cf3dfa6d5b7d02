"""Submitting a job: a form made of the schema, checked and planned while it is filled in."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import yaml
from fastapi import Request
from nicegui import ui

from configs.errors import SpecError
from configs.load import PresetInfo, apply_overrides, list_presets
from configs.plan import Plan, StagePlan
from orchestrator.dashboard import parts, words
from orchestrator.dashboard.form import FORM_KINDS, FormField, essentials, form_fields, groups, value_at
from orchestrator.dashboard.frame import PATIENCE_S, Frame, Site, url
from orchestrator.schemas import JobPreview
from orchestrator.services.auth import Actor
from orchestrator.services.idempotency import key_for
from orchestrator.services.jobs import get_job
from orchestrator.services.problems import ApiError
from orchestrator.services.submission import Request as Description
from orchestrator.services.submission import Submitted, preview_job, submit_job

_WORDS = {
    "pretrain": "Pretrain: from scratch",
    "finetune": "Fine-tune: from a checkpoint",
    "evaluate": "Evaluate a checkpoint",
    "export": "Export a checkpoint to another format",
}
_GROUP_WORDS = {
    "general": "Labels and more",
    "data": "Data",
    "model": "Model",
    "optim": "Optimizer",
    "schedule": "Schedule",
    "train": "Training",
    "zero": "ZeRO",
    "resources": "Workers",
    "queue": "Queue",
    "retry": "Retries",
    "checkpoint": "Checkpoints",
    "eval": "Evaluation",
}


@dataclass(frozen=True)
class _Checked:
    """What the server thinks of the description: what it would store, or what is wrong where."""

    preview: JobPreview | None
    wrong: dict[str, str]


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/submit", response_timeout=PATIENCE_S)
    async def show(request: Request) -> None:
        query = request.query_params
        base: dict[str, Any] = {}
        if query.get("from"):
            try:
                job = await site.access.run(lambda: get_job(site.services.db, query["from"]))
                base = apply_overrides(job.submitted.get("spec", {}), job.submitted.get("overrides", {}))
            except (ApiError, SpecError):
                base = {}
        presets = await site.access.run(_prepared)
        with Frame(site, request, "Submit a job", "submit") as frame:
            if not frame.may_write:
                parts.empty("You may look, but not submit.", "Ask an administrator for a token with the role member.")
                return
            page = _Page(frame, presets, query.get("preset", ""), base)
        await page.check()


def _prepared() -> dict[str, PresetInfo]:
    """Presets by name. Like the form's fields they are read once, and that takes its time: not on the event loop."""
    for kind in FORM_KINDS:
        form_fields(kind)
    return {info.name: info for info in list_presets()}


class _Page:
    def __init__(self, frame: Frame, presets: dict[str, PresetInfo], preset: str, base: dict[str, Any]) -> None:
        self.frame = frame
        self._presets = presets
        self._base = base
        self._preset = preset if preset in self._presets else ""
        self._changes: dict[str, str] = {}
        self._fields: dict[str, parts.Field] = {}
        self._checking = 0
        # A button that is pressed twice submits once.
        self._key = uuid.uuid4().hex
        kind = self._info.kind if self._info else str(base.get("kind", "pretrain"))
        self._kind = kind if kind in FORM_KINDS else "pretrain"
        with parts.tag("div", "", "head"), parts.tag("div", "", "title"):
            parts.tag("h1", "Submit a job")
        with parts.tag("div", "", "submit-cols"):
            with parts.stack():
                self._choose()
                self._form = parts.stack()
            with parts.tag("div", "", "beside"):
                self._draw_verdict()
        self._draw_form()

    @property
    def _info(self) -> PresetInfo | None:
        return self._presets.get(self._preset)

    # -- where to start from -------------------------------------------------------------------------------------------
    def _choose(self) -> None:
        with parts.card("Start from"):
            with parts.tag("div", "", "form-grid"):
                self._kind_field = parts.choice("Kind of job", _WORDS, self._kind, self._set_kind)
                names = {"": "Nothing: the defaults"} | {name: name for name in self._presets}
                self._preset_field = parts.choice("Preset", names, self._preset, self._set_preset, classes="wide")
            self._about = parts.stack("tight")
        self._draw_about()

    def _draw_about(self) -> None:
        self._about.clear()
        with self._about:
            if (info := self._info) is not None:
                parts.tag("p", info.title, "strong")
                parts.tag("p", f"{info.cost} {info.accuracy} {info.shown}", "soft")
            elif self._base:
                parts.tag("p", "The description of another job, to be changed.", "soft")

    async def _set_kind(self, kind: str) -> None:
        self._kind = kind if kind in FORM_KINDS else "pretrain"
        if self._info is not None and self._info.kind != self._kind:
            self._preset = ""
            self._preset_field.set_value("")
        await self._start_from(has_other_fields=True)

    async def _set_preset(self, name: str) -> None:
        self._preset = name if name in self._presets else ""
        info = self._info
        has_other_fields = info is not None and info.kind != self._kind
        if info is not None and has_other_fields:
            self._kind = info.kind
            self._kind_field.set_value(info.kind)
        await self._start_from(has_other_fields)

    async def _start_from(self, has_other_fields: bool) -> None:
        """Show what is said now where nothing else was written; what was written stays."""
        self._base = {}
        ui.navigate.history.replace(url("/submit", preset=self._preset))
        self._draw_about()
        if has_other_fields:
            known = {field.path for field in form_fields(self._kind)}
            self._changes = {path: value for path, value in self._changes.items() if path in known}
            self._draw_form()
        else:
            # The fields stay: somebody may be writing in one of them already.
            for path, field in self._fields.items():
                if path not in self._changes:
                    field.set_value(value_at(self._said(), path))
        await self.check()

    # -- the form ------------------------------------------------------------------------------------------------------
    def _draw_form(self) -> None:
        self._form.clear()
        self._fields.clear()
        with self._form:
            with parts.card("The job"), parts.tag("div", "", "form-grid"):
                for field in essentials(self._kind):
                    self._add(field)
            with parts.card("Everything else"):
                for group, fields in groups(self._kind).items():
                    self._add_group(group, fields)

    def _add_group(self, group: str, fields: tuple[FormField, ...]) -> None:
        with parts.tag("details", "", "group") as box:
            parts.tag("summary", _GROUP_WORDS.get(group, group.capitalize()))
            grid = parts.tag("div", "", "form-grid")

        def open_(_: Any) -> None:
            if not grid.default_slot.children:
                with grid:
                    for field in fields:
                        self._add(field)

        box.on("toggle", open_, js_handler="() => emit()")

    def _add(self, field: FormField) -> None:
        said = self._changes.get(field.path) or value_at(self._said(), field.path)
        # Nested settings that are off by default have no default of their own to show.
        parents = field.path.split(".")[1:-1]
        inside = "" if field in essentials(self._kind) else "".join(f"{part.replace('_', ' ')}: " for part in parents)
        label = f"{inside}{field.label.lower() if inside else field.label}".capitalize() if inside else field.label

        async def changed(value: str) -> None:
            await self._set(field.path, value)

        if field.options:
            options = {"": f"Default ({field.default})" if field.default else "Default"}
            options |= {option: option for option in field.options}
            control = parts.choice(label, options, said, changed, help=field.help)
        else:
            control = parts.text_field(label, said, changed, help=field.help, placeholder=field.default or "not set")
        self._fields[field.path] = control

    async def _set(self, path: str, value: str) -> None:
        if value.strip() and value.strip() != value_at(self._said(), path):
            self._changes[path] = value.strip()
        else:
            self._changes.pop(path, None)
        await self.check()

    def _said(self) -> dict[str, Any]:
        """What preset or base already say."""
        return self._info.spec if self._info is not None else self._base

    # -- the verdict ---------------------------------------------------------------------------------------------------
    def _description(self) -> Description:
        if self._info is not None:
            return Description({"preset": self._preset}, dict(self._changes))
        if self._base:
            return Description(self._base, dict(self._changes))
        return Description({"kind": self._kind}, dict(self._changes))

    async def check(self) -> None:
        """Ask what the server thinks of what stands there now."""
        self._checking += 1
        mine, description = self._checking, self._description()
        checked = await self.frame.read(lambda: _check(self.frame, description))
        if mine == self._checking and not self.frame.client.is_deleted:
            self._show(checked)

    def _draw_verdict(self) -> None:
        with parts.card("Check and plan"):
            self._verdict = parts.tag("div", "", "stack", role="status")
            self._button = parts.button("Submit", self._submit, "main", disabled=True)

    def _show(self, checked: _Checked) -> None:
        elsewhere = []
        for path, field in self._fields.items():
            field.say_wrong(checked.wrong.get(path, ""))
        for path, message in checked.wrong.items():
            if path not in self._fields:
                elsewhere.append(f"{path}: {message}" if path else message)
        self._button.props["disabled"] = checked.preview is None
        self._button.update()
        self._verdict.clear()
        with self._verdict:
            if checked.preview is not None:
                parts.tag("p", "Valid: it can be submitted.", "note-box good")
                _draw_plan(Plan.model_validate(checked.preview.plan))
                text = yaml.safe_dump(self._file(), sort_keys=False, allow_unicode=True)
                parts.copy_button(text, "Copy as job.yaml")
                return
            number = len(checked.wrong)
            parts.tag("p", f"{number} thing{'' if number == 1 else 's'} to mend.", "note-box warn")
            for line in elsewhere[:8]:
                parts.tag("p", line, "small wrap")

    def _file(self) -> dict[str, Any]:
        description = self._description()
        return apply_overrides(description.spec, description.overrides)

    async def _submit(self) -> None:
        description = self._description()

        def work(actor: Actor) -> Submitted:
            key = key_for(actor, self._key, b"dashboard", repr(description).encode())
            return submit_job(self.frame.services.db, actor, description, key)

        submitted = await self.frame.act(work)
        if submitted is None:
            self._key = uuid.uuid4().hex
        else:
            self.frame.go(url(f"/jobs/{submitted.job_id}"))


def _check(frame: Frame, description: Description) -> _Checked:
    try:
        return _Checked(preview_job(frame.services.db, description), {})
    except SpecError as error:
        return _Checked(None, {fault.pointer.strip("/").replace("/", "."): fault.message for fault in error.errors})


def _draw_plan(plan: Plan) -> None:
    parts.facts(
        (
            ("Parameters", words.count(plan.parameters) if plan.parameters else ""),
            ("Steps", f"{plan.steps:,} ({plan.epochs:.3g} epochs)" if plan.steps and plan.epochs else ""),
            ("Operations", f"{plan.exaflops:.3g} exaFLOPs" if plan.exaflops else ""),
            ("Time", f"about {words.duration(plan.hours * 3600)}" if plan.hours else ""),
            ("GPU hours", f"{plan.gpu_hours:,.3g}" if plan.gpu_hours else ""),
            ("Workers", f"{plan.world_size} × {plan.accelerator or 'CPU'}" if plan.world_size else ""),
            ("Micro-batch", str(plan.micro_batch_size) if plan.micro_batch_size else ""),
        )
    )
    if plan.stages:
        _draw_stages(plan.stages, plan.zero_stage)
    for note in plan.notes:
        parts.tag("p", note, "soft small")


def _draw_stages(stages: tuple[StagePlan, ...], chosen: int | None) -> None:
    """Memory at each ZeRO stage: what fits."""
    columns = (
        {"key": "stage", "label": "ZeRO"},
        {"key": "memory", "label": "GiB a GPU", "end": True},
        {"key": "fits", "label": "Fits"},
    )
    verdicts = {True: {"text": "Yes", "tone": "good"}, False: {"text": "No", "tone": "bad"}, None: "not planned on CPU"}
    table = parts.Rows("Memory by ZeRO stage", columns, cards=False)
    table.show_rows(
        [
            {
                "id": str(stage.stage),
                "stage": f"{stage.stage}{' (chosen)' if stage.stage == chosen else ''}",
                "memory": f"{stage.total_gib:.1f}",
                "fits": verdicts[stage.fits],
            }
            for stage in stages
        ]
    )
