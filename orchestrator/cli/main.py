"""`patchwork`: the program. Exit codes: 0 done, 1 failed (also: the job that was followed), 2 wrong usage or job
description, 3 no server, 4 the server refused, 130 stopped by Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from configs.load import SpecError
from orchestrator.cli import (
    admin,
    convert,
    demo,
    finetune,
    gallery,
    imports,
    inspect,
    jobs,
    output,
    plan,
    report,
    search,
    stack,
    steer,
    telemetry,
    train,
    vtab,
    weights,
)
from orchestrator.cli.follow import Detached
from orchestrator.cli.options import Wiring
from orchestrator.client import ApiError, NotConfigured, PatchworkError, Unreachable

app = typer.Typer(
    name="patchwork",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Train Vision Transformers on a shared cluster, or on this machine.

[bold]Start here[/]: everything on this machine, a small ViT trained on it, its weights taken away

  patchwork up

  patchwork submit --preset demo/fashion-mnist-pretrain --follow

  patchwork fetch

[bold]Before you queue[/]: what there is to start from, and what it would take

  patchwork presets

  patchwork plan --preset paper/pretrain/imagenet21k-l16-90ep --gpu H100:64
""",
)
_RUN, _LOOK, _PLAN, _SERVER = "Run jobs", "Look at jobs", "Without a server", "Server"
for command, panel in (
    (jobs.submit, _RUN),
    (jobs.cancel, _RUN),
    (jobs.pause, _RUN),
    (jobs.resume, _RUN),
    (jobs.retry, _RUN),
    (steer.fork, _RUN),
    (steer.edit, _RUN),
    (finetune.finetune, _RUN),
    (imports.import_weights, _RUN),
    (weights.fetch, _RUN),
    (steer.overview, _LOOK),
    (jobs.list_jobs, _LOOK),
    (jobs.show, _LOOK),
    (telemetry.logs, _LOOK),
    (telemetry.metrics, _LOOK),
    (telemetry.events, _LOOK),
    (steer.compare, _LOOK),
    (steer.lineage, _LOOK),
    (report.report, _LOOK),
    (inspect.inspect, _LOOK),
    (plan.plan, _PLAN),
    (plan.presets, _PLAN),
    (train.train, _PLAN),
    (convert.convert, _PLAN),
    (stack.up, _SERVER),
    (stack.down, _SERVER),
    (admin.cluster, _SERVER),
    (admin.version, _SERVER),
):
    named = {"list_jobs": "list", "import_weights": "import"}.get(command.__name__, command.__name__)
    app.command(named, rich_help_panel=panel)(command)
# For `make demo`: it wants a folder it may empty.
app.command("demo", hidden=True)(demo.demo)
# For `make pictures`, likewise.
app.command("gallery", hidden=True)(gallery.gallery)
app.add_typer(search.search_app, name="search", rich_help_panel=_RUN)
app.add_typer(imports.checkpoints_app, name="checkpoints", rich_help_panel=_LOOK)
app.add_typer(vtab.vtab_app, name="vtab", rich_help_panel=_RUN)
app.add_typer(admin.datasets_app, name="datasets", rich_help_panel=_SERVER)
app.add_typer(admin.tokens_app, name="tokens", rich_help_panel=_SERVER)


def run(arguments: Sequence[str], wiring: Wiring | None = None) -> int:
    """Run the command line; returns its exit code. Errors are printed, with what to do next."""
    try:
        app(args=list(arguments), obj=wiring or Wiring())
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except Detached as left:
        output.errors().print(str(left), markup=False)
        return 130
    except SpecError as error:
        return _fail(2, "The job description is not valid.", [f"{e.pointer or '/'}: {e.message}" for e in error.errors])
    except ApiError as error:
        problem = error.problem
        lines = [f"{e.pointer or '/'}: {e.message}" for e in problem.errors]
        detail = problem.detail.partition(". /")[0] if lines else problem.detail
        return _fail(2 if problem.status == 422 else 4, detail, lines, problem.hint)
    except (NotConfigured, Unreachable) as error:
        return _fail(3, str(error))
    except (PatchworkError, LookupError, FileExistsError) as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(code: int, message: str, lines: Sequence[str] = (), hint: str | None = None) -> int:
    err = output.errors()
    err.print(f"[bold red]Error[/] {escape(message)}")
    for line in lines:
        err.print(f"  {escape(line)}")
    if hint:
        err.print(f"[dim]{escape(hint)}[/]")
    return code


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
