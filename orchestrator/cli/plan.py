"""Commands that need no server: what a job would take, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from configs.datasets import PLANNING_CARDS, card_for
from configs.load import apply_overrides, list_presets, load_preset, parse_for_plan
from configs.plan import Plan
from configs.plan import plan as make_plan
from configs.resolve import data_of
from orchestrator.cli import output
from orchestrator.cli.jobs import Preset, SpecFile, read_spec
from orchestrator.cli.options import Json, Overrides, Token, Url, client_for, parse_overrides


def plan(
    ctx: typer.Context,
    spec: SpecFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME[:COUNT]", help="Plan for these, such as H100:8.")
    ] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Ask the server: it knows registered data sets and checkpoints.")
    ] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Say what a job would take: memory at every ZeRO stage, steps, operations, hours. Nothing is submitted.

    Examples:

      patchwork plan --preset paper/pretrain/imagenet21k-l16-90ep --gpu H100:64

      patchwork plan my-job.yaml --set model.variant=H/14 --gpu A100-80GB:32

      patchwork plan --preset search/flowers-lr --gpu A100-80GB:8
    """
    raw, wanted = read_spec(spec, preset), parse_overrides(overrides)
    if server:
        with client_for(ctx, url, token) as client:
            made = client.plan(raw, wanted, gpu)
    else:
        parsed = parse_for_plan(apply_overrides(raw, wanted))
        data = data_of(parsed)
        made = make_plan(parsed, None if data is None else card_for(data.source, PLANNING_CARDS), gpu)
    if as_json:
        output.print_json(made)
    else:
        print_plan(made.model_dump())


def print_plan(plan_fields: Mapping[str, Any]) -> None:
    """Print a plan's numbers and its table of ZeRO stages."""
    made = Plan.model_validate(plan_fields)
    out = output.console()
    for label, value in _lines(made):
        out.print(f"  [bold]{label:<12}[/]{escape(value)}")
    if made.stages:
        rows = [
            (
                ("* " if stage.stage == made.zero_stage else "  ") + str(stage.stage),
                f"{stage.state_gib:.2f}",
                f"{stage.activation_gib:.2f}",
                f"{stage.total_gib:.2f}",
                {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}[stage.fits],
                "-" if stage.max_micro_batch is None else str(stage.max_micro_batch),
                "-" if stage.hours is None else f"{stage.hours:,.3g}",
                "-" if stage.gpu_hours is None else f"{stage.gpu_hours:,.3g}",
            )
            for stage in made.stages
        ]
        columns = (
            "ZERO",
            "STATE GiB>",
            "ACTIVATIONS GiB>",
            "TOTAL GiB>",
            "FITS",
            "LARGEST MICRO-BATCH>",
            "HOURS>",
            "GPU-HOURS>",
        )
        out.print(output.table(columns, rows))
    for note in made.notes:
        out.print(f"[dim]- {escape(note)}[/]")


def _lines(made: Plan) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if made.parameters is not None:
        macs = "" if made.macs is None else f", {made.macs / 1e9:,.3g} G multiply-accumulates per image"
        lines.append(("model", f"{made.parameters / 1e6:,.2f} M parameters{macs}"))
    if made.steps is not None:
        epochs = "" if made.epochs is None else f", {made.epochs:,.3g} epochs of {made.num_examples:,} images"
        lines.append(("training", f"{made.steps:,} steps of {made.global_batch_size:,} images{epochs}"))
    elif made.num_examples is not None:
        lines.append(("images", f"{made.num_examples:,}"))
    if made.exaflops is not None:
        lines.append(("operations", f"{made.exaflops:,.3g} exaFLOPs"))
    if made.world_size is not None:
        device = f" x {made.accelerator} ({made.memory_gib:.0f} GiB)" if made.accelerator else ""
        batch = f", micro-batch {made.micro_batch_size} x {made.grad_accum_steps} accumulation steps"
        lines.append(("workers", f"{made.world_size}{device}{batch if made.micro_batch_size else ''}"))
    if len(made.allowed_world_sizes) > 1:
        lines.append(("may run on", ", ".join(map(str, made.allowed_world_sizes)) + " workers"))
    if made.hours is not None:
        band = f", give or take {made.error_band_pct} %" if made.error_band_pct else ""
        bound = " (decoding binds)" if made.bound == "decode" else ""
        rate = f"{made.images_per_s:,.0f} images/s{bound}: " if made.images_per_s else ""
        devices = f" ({made.gpu_hours:,.3g} GPU-hours)" if made.gpu_hours else ""
        lines.append(("time", f"{rate}{made.hours:,.3g} hours{devices}{band}"))
    elif made.steps is not None:
        lines.append(("time", "unknown: no measured rate for this hardware (--gpu plans for a known one)"))
    if made.checkpoint_bytes is not None:
        lines.append(("checkpoint", output.num_bytes(made.checkpoint_bytes)))
    return lines


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the presets, or show one: what it is, what it costs, what it should reach, its settings."""
    out = output.console()
    if name is None:
        found = list_presets()
        if as_json:
            output.print_json({"items": [vars(preset) for preset in found]})
            return
        rows = [(preset.name, preset.kind, escape(preset.title)) for preset in found]
        out.print(output.table(("PRESET", "KIND", "WHAT IT IS"), rows))
        out.print("[dim]More about one: patchwork presets NAME. Submit it: patchwork submit --preset NAME --follow[/]")
        return
    preset = load_preset(name)
    if as_json:
        output.print_json(vars(preset))
        return
    out.print(f"[bold]{preset.name}[/]  {escape(preset.title)}")
    for label in ("command", "source", "cost", "accuracy", "shown"):
        if getattr(preset, label):
            out.print(f"  {label:<10}{escape(getattr(preset, label))}")
    import yaml

    out.print(escape(yaml.safe_dump(preset.spec, sort_keys=False, default_flow_style=None, width=110)))
