"""The command line: what it prints, its exit codes, and that the base install is enough for what needs no server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from orchestrator.cli.main import app, run
from orchestrator.cli.options import Wiring

JOB = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
Routes = dict[tuple[str, str], Callable[[httpx.Request], httpx.Response]]


def job(state: str = "RUNNING", **changes: Any) -> dict[str, Any]:
    """A job as the API shows it."""
    return {
        "id": JOB,
        "kind": "pretrain",
        "name": "little-vit",
        "project": "default",
        "labels": {},
        "priority": 50,
        "state": state,
        "desired": "run",
        "reason": None,
        "message": "",
        "state_since": "2026-01-01T00:00:00Z",
        "allowed_actions": ["cancel"],
        "progress": {"step": 50, "total_steps": 100, "pct": 50.0, "eta_s": 12.0},
        "spec": {},
        "spec_hash": "sha256:0",
        "training_fingerprint": "sha256:0",
        "preset": None,
        "submitted": {},
        "plan": {},
        "num_attempts": 1,
        "attempts": [],
        "usage": {"gpu_seconds": 10.0, "wasted_gpu_s": 0.0, "wasted_steps": 0, "overhead_s": 0.0},
        "last_metrics": {"train/loss": 0.5, "eval/top1": 0.8765, "perf/images_per_s": 1234.0},
        "init_from": None,
        "retry_of": None,
        "created_by": "ada",
        "created_at": "2026-01-01T00:00:00Z",
        "started_at": "2026-01-01T00:00:01Z",
        "ended_at": None,
        "etag": '"1"',
    } | changes


def ok(body: object) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(200, json=body)


def patchwork(routes: Routes, *arguments: str) -> int:
    """Run a command against a server that has these routes; returns its exit code."""

    def handle(request: httpx.Request) -> httpx.Response:
        route = routes.get((request.method, request.url.path))
        assert route is not None, f"unexpected {request.method} {request.url.path}"
        return route(request)

    server = ("--url", "http://patchwork.test", "--token", "t")
    return run([*arguments, *server], Wiring(httpx.MockTransport(handle)))


NO_EVENTS = {("GET", f"/v1/jobs/{JOB}/events"): ok({"items": [], "next_after": 0})}


# -- jobs ------------------------------------------------------------------------------------------------------------
def test_submit_sends_file_preset_and_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[dict[str, Any]] = []

    def create(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(201, json=job("QUEUED"))

    spec = tmp_path / "job.yaml"
    spec.write_text("name: mine\ntrain: {seed: 3}\n")
    routes: Routes = {("POST", "/v1/jobs"): create}
    code = patchwork(
        routes, "submit", str(spec), "--preset", "demo/fashion-mnist-pretrain", "--set", "optim.lr=3e-4", "--name", "n"
    )
    assert code == 0
    expected = {"name": "n", "train": {"seed": 3}, "preset": "demo/fashion-mnist-pretrain"}
    assert sent == [{"spec": expected, "overrides": {"optim.lr": "3e-4"}}]
    assert f"patchwork show {JOB} --follow" in capsys.readouterr().out


@pytest.mark.parametrize(("final_state", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_submit_follow_ends_with_the_job(final_state: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    states = iter(["QUEUED", "RUNNING", final_state])
    ended = {"ended_at": "2026-01-01T00:01:00Z"}

    def get(_: httpx.Request) -> httpx.Response:
        state = next(states)
        return httpx.Response(200, json=job(state, **(ended if state == final_state else {})))

    routes: Routes = {
        ("POST", "/v1/jobs"): ok(job("QUEUED")),
        ("GET", f"/v1/jobs/{JOB}"): get,
        **NO_EVENTS,
    }
    assert patchwork(routes, "submit", "--preset", "demo/fashion-mnist-pretrain", "--follow") == code
    out = capsys.readouterr().out
    assert "step 50/100" in out
    assert "loss 0.5000" in out
    assert "top-1 87.65 %" in out
    assert f"{final_state} after 1 min 00 s" in out
    assert (f"patchwork fetch {JOB}/best" in out) == (final_state == "SUCCEEDED")


def test_ctrl_c_while_following_leaves_the_job_and_says_how_to_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: httpx.Request) -> httpx.Response:
        raise KeyboardInterrupt

    routes: Routes = {("POST", "/v1/jobs"): ok(job("QUEUED")), ("GET", f"/v1/jobs/{JOB}"): interrupt}
    assert patchwork(routes, "submit", "--preset", "demo/fashion-mnist-pretrain", "-f") == 130
    err = capsys.readouterr().err
    assert "the job goes on" in err
    assert f"patchwork show {JOB} --follow" in err


def test_events_with_markup_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    event = {
        "seq": 1,
        "job_id": JOB,
        "attempt": 1,
        "type": "attempt.ended",
        "message": "Attempt 1 ended: [red]odd[/red] text\nand a second line",
        "actor": "reconciler",
        "data": {},
        "at": "2026-01-01T00:00:00Z",
    }
    pages = iter([{"items": [event], "next_after": 1}, {"items": [], "next_after": 1}])
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(job("SUCCEEDED")),
        ("GET", f"/v1/jobs/{JOB}/events"): lambda _: httpx.Response(200, json=next(pages)),
    }
    assert patchwork(routes, "events", JOB) == 0
    assert "[red]odd[/red] text" in capsys.readouterr().out


def test_list_shows_jobs_and_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = job("QUEUED", reason="WAITING_FOR_WORKERS", queue={"position": 2, "reason": "X", "message": "m"})
    routes: Routes = {("GET", "/v1/jobs"): ok({"items": [job(), waiting], "next_cursor": None})}
    assert patchwork(routes, "list") == 0
    out = capsys.readouterr().out
    assert "little-vit" in out
    assert "WAITING_FOR_WORKERS" in out
    assert patchwork(routes, "list", "--json") == 0
    assert [item["state"] for item in json.loads(capsys.readouterr().out)] == ["RUNNING", "QUEUED"]


def test_show_leaves_out_what_only_proves_the_order_of_samples(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"train/loss": 0.5, "data/sample_ids_crc32/rank-00000": 123.0}
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(job(last_metrics=metrics)),
        ("GET", f"/v1/jobs/{JOB}/checkpoints"): ok({"items": []}),
    }
    assert patchwork(routes, "show", JOB) == 0
    out = capsys.readouterr().out
    assert "train/loss 0.5" in out
    assert "crc32" not in out


def test_show_last_takes_the_newest_job(capsys: pytest.CaptureFixture[str]) -> None:
    routes: Routes = {
        ("GET", "/v1/jobs"): ok({"items": [job("FAILED", reason="NAN_LOSS", advice="Lower optim.lr.")]}),
        ("GET", f"/v1/jobs/{JOB}/checkpoints"): ok({"items": []}),
    }
    assert patchwork(routes, "show") == 0
    out = capsys.readouterr().out
    assert "NAN_LOSS" in out
    assert "Lower optim.lr." in out


def failed_job(state: str = "FAILED") -> dict[str, Any]:
    """A job whose only attempt ended of its data, as the API shows it."""
    lines = [f"line {number}" for number in range(40)] + ["DataError: \x1b[2J[bold]a.png is no image"]
    attempt = {
        "id": f"att_{JOB.removeprefix('job_')}_0001",
        "number": 1,
        "state": "ENDED",
        "world_size": 2,
        "nodes": ["node-a", "node-b"],
        "ranks": [],
        "from_checkpoint": None,
        "from_step": 0,
        "to_step": 0,
        "phase": "building",
        "exit_reason": "DATA_ERROR",
        "exit_message": "Rank 1: a.png is no image",
        "first_failure": {"rank": 1, "node": "node-b", "error_type": "DataError", "message": "", "last_lines": lines},
        "advice": "Repair the data set.",
        "wasted_steps": 0,
        "created_at": "2026-01-01T00:00:00Z",
        "submitted_at": None,
        "first_step_at": None,
        "last_report_at": None,
        "ended_at": "2026-01-01T00:00:09Z",
    }
    said = {"reason": "CRASH_LOOP", "message": "The same failure twice", "advice": "Mend what its error names."}
    return job(state, attempts=[attempt], ended_at="2026-01-01T00:01:00Z", **said)


@pytest.mark.parametrize("command", [("show", JOB), ("show", JOB, "--follow")])
def test_a_job_that_failed_shows_cause_last_lines_and_advice(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(failed_job()),
        ("GET", f"/v1/jobs/{JOB}/checkpoints"): ok({"items": []}),
        **NO_EVENTS,
    }
    patchwork(routes, *command)
    out = capsys.readouterr().out
    assert "CRASH_LOOP: The same failure twice" in out
    assert "rank 1 on node-b first (DataError); its last lines:" in out
    assert "    line 39\n    DataError: \\x1b[2J[bold]a.png is no image\n" in out
    assert "line 25" not in out, "the rest is in the log"
    assert f"patchwork logs {JOB}" in out
    assert out.index("next        Repair the data set.") < out.index("next        Mend what its error names.")


def test_a_job_that_recovers_shows_what_failed_and_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    recovering = failed_job("RECOVERING") | {"advice": None, "ended_at": None}
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(recovering),
        ("GET", f"/v1/jobs/{JOB}/checkpoints"): ok({"items": []}),
    }
    assert patchwork(routes, "show", JOB) == 0
    out = capsys.readouterr().out
    assert "rank 1 on node-b first" in out
    assert "  next  " not in out


def test_logs_escape_what_could_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"t": "2026-01-01T00:00:00Z", "stream": "rank-00000", "msg": "\x1b[2Jgone\nsecond"}
    pages = iter([{"lines": [line], "cursor": "c", "complete": False}, {"lines": [], "cursor": "c", "complete": True}])
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(job()),
        ("GET", f"/v1/jobs/{JOB}/logs"): lambda _: httpx.Response(200, json=next(pages)),
    }
    assert patchwork(routes, "logs", JOB) == 0
    assert "\\x1b[2Jgone\n    second\n" in capsys.readouterr().out


def test_metrics_show_last_value_range_and_curve(capsys: pytest.CaptureFixture[str]) -> None:
    series = {
        "name": "train/loss",
        "steps": [10, 20, 30],
        "values": [2.0, None, 0.5],
        "lows": [2.0, None, 0.5],
        "highs": [2.0, None, 0.5],
        "attempts": [1, 1, 1],
        "num_points": 3,
    }
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(job()),
        ("GET", f"/v1/jobs/{JOB}/metrics"): ok({"job_id": JOB, "names": ["train/loss"], "series": [series]}),
    }
    assert patchwork(routes, "metrics", JOB, "train/loss") == 0
    out = capsys.readouterr().out
    assert "0.5 to 2" in out
    assert "█ ▁" in out


# -- errors ----------------------------------------------------------------------------------------------------------
def problem(
    status: int, detail: str, errors: tuple[tuple[str, str], ...] = ()
) -> Callable[[httpx.Request], httpx.Response]:
    listed = [{"pointer": pointer, "message": message} for pointer, message in errors]
    body = {"title": "T", "status": status, "detail": detail, "code": "c", "errors": listed, "hint": "Do this."}
    return lambda _: httpx.Response(status, json=body)


def test_a_refused_description_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    faults = (("/optim/lr", "-1 is not allowed"), ("/model/depht", "unknown field 'depht'"))
    routes: Routes = {("POST", "/v1/jobs"): problem(422, "Not valid.", faults)}
    assert patchwork(routes, "submit", "--preset", "demo/fashion-mnist-pretrain") == 2
    err = capsys.readouterr().err
    for part in ("/optim/lr: -1 is not allowed", "/model/depht: unknown field", "Do this."):
        assert part in err


def test_exit_codes_tell_a_refusal_from_an_absent_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert patchwork({("GET", f"/v1/jobs/{JOB}"): problem(404, "There is no job.")}, "show", JOB) == 4
    assert "There is no job." in capsys.readouterr().err
    for name in ("PATCHWORK_URL", "PATCHWORK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATCHWORK_DATA_DIR", str(tmp_path))
    assert run(["list"]) == 3
    assert "patchwork up" in capsys.readouterr().err
    assert run(["down"]) == 0
    assert "Nothing runs" in capsys.readouterr().out
    assert run(["submit"]) == 2
    assert run(["submit", "--preset", "demo/fashion-mnist-pretrain", "--set", "optim.lr"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


# -- without a server ------------------------------------------------------------------------------------------------
def test_plan_prints_every_zero_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--preset", "paper/pretrain/imagenet21k-l16-90ep", "--gpu", "H100:64"]) == 0
    out = capsys.readouterr().out
    assert "326.74 M parameters" in out
    assert [line.split()[0] for line in out.splitlines() if line[:2] in ("  ", "* ") and line[2:3].isdigit()]
    assert run(["plan", "--preset", "paper/pretrain/imagenet21k-l16-90ep", "--gpu", "H100:64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in plan["stages"]] == [0, 1, 2, 3]


def test_plan_names_the_faulty_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("preset: demo/fashion-mnist-pretrain\nmodel: {depht: 3}\n")
    assert run(["plan", str(spec)]) == 2
    assert "/model/depht: unknown field 'depht'. Did you mean depth" in capsys.readouterr().err
    assert run(["plan", "--preset", "demo/nothing"]) == 2
    assert "unknown preset" in capsys.readouterr().err


def test_presets_lists_all_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets"]) == 0
    assert "demo/fashion-mnist-pretrain" in capsys.readouterr().out
    assert run(["presets", "demo/fashion-mnist-pretrain"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "FashionMNIST" in out


def test_every_command_has_help_that_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.main.get_command(app)
    names = [name for name, sub in command.commands.items() if not sub.hidden]  # type: ignore[attr-defined]
    assert {"up", "down", "submit", "list", "show", "logs", "metrics", "events", "cancel", "retry", "plan"} <= set(
        names
    )
    assert {"presets", "datasets", "cluster", "tokens", "fetch", "version"} <= set(names)
    for name in names:
        assert run([name, "--help"]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from orchestrator.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
NOT_IN_THE_BASE_INSTALL = {
    "torch", "torchvision", "ray", "deepspeed", "fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic", "boto3",
    "botocore", "psutil", "pydantic_settings", "prometheus_client", "sse_starlette", "psycopg",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (["--help"], "Start here", 0),
        (["presets"], "demo/fashion-mnist-pretrain", 0),
        (["plan", "--preset", "demo/fashion-mnist-pretrain"], "parameters", 0),
        (["list", "--url", "http://127.0.0.1:9"], "does not answer", 3),
        (["up"], "pip install 'patchwork-vit[local]'", 1),
    ],
)
def test_the_base_install_is_enough_without_a_server(
    arguments: list[str], expected: str, code: int, tmp_path: Path
) -> None:
    program = BLOCKED.format(blocked=NOT_IN_THE_BASE_INSTALL)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PATCHWORK_DATA_DIR": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert expected in done.stdout + done.stderr
    assert done.returncode == code
