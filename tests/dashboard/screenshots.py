"""Every page of the dashboard in light, dark and narrow, of a real stack with real jobs:

make screenshots            # into screenshots/
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from tests.dashboard.conftest import BROWSER_ARGUMENTS, visiting
from tests.stack.jobs import pretraining, until
from tests.stack.running import running_stack

LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}
_ON_CPU = {"resources": {"gpus_per_worker": 0}}
IN_DOCS = {"job-light": "dashboard-job.png", "compare-dark": "dashboard-compare.png"}


def make_jobs(client: Client) -> dict[str, str]:
    """Jobs to look at: two that are done and what was made of one of them, a search, one that runs, one that waits, one
    that failed. Returns their ids."""
    jobs = client.jobs
    settings = {"eval__every_steps": 20, "train__log_every_steps": 1, "resources__workers": 1}
    done = [
        jobs.create(pretraining(name=f"fashion-ti7-lr{lr}", optim__lr=lr, schedule__total_steps=160, **settings)).id
        for lr in (2e-3, 5e-4)
    ]
    # Divided by almost nothing, the images overflow.
    failed = jobs.create(pretraining(name="fashion-std-too-small", data__std=[1e-42], **settings)).id
    for job_id in done:
        jobs.wait(job_id, 600)
    until("the failure", lambda: jobs.get(failed).is_terminal, 300)
    start = client.checkpoints.find(f"{done[0]}/latest").id
    fork = jobs.fork(done[0], {"checkpoint.every_steps": 40}, checkpoint=client.jobs.checkpoints(done[0])[-1].id)
    exported = jobs.create({"kind": "export", "name": "fashion-timm", "init_from": start, "format": "timm", **_ON_CPU})
    search = jobs.create(_search())
    for job_id in (fork.id, exported.id, search.id):
        jobs.wait(job_id, 900)
    running = jobs.create(
        pretraining(name="fashion-ti7-long", schedule__total_steps=4000, labels={"team": "vision"}, **settings)
    ).id
    waiting = jobs.create(pretraining(name="fashion-b16-16-workers", resources__workers=16)).id
    until("it trains", lambda: jobs.get(running).progress.step > 60, 300)
    ids = {"done": done[0], "other": done[1], "failed": failed, "running": running, "waiting": waiting}
    return ids | {"search": search.id, "exported": exported.id}


def _search() -> dict[str, Any]:
    """Six short trials of a learning rate and an optimizer."""
    base = pretraining(
        schedule={"total_steps": 40, "warmup_steps": 4},
        checkpoint={"every_steps": 20, "keep_last": 1},
        eval={"every_steps": 10, "batch_size": 500},
        data__holdout={"fraction": 0.02},
        data__subset=None,
        data__augment={"crop": "resize"},
        zero={"stage": 0},
        resources__workers=1,
    )
    space = {
        "optim.lr": {"type": "log_uniform", "low": 1e-4, "high": 1e-2},
        "optim.weight_decay": {"type": "log_uniform", "low": 1e-4, "high": 1e-1},
    }
    return {"kind": "search", "name": "fashion-lr-decay", "base": base, "space": space, "budget": {"trials": 6}}


def take(browser: Browser, stack: Stack, ids: dict[str, str], out: Path) -> None:
    """A picture of every page in every look."""
    pages = {
        "overview": "/overview",
        "jobs": "/jobs",
        "job": f"/jobs/{ids['done']}",
        "attempts": f"/jobs/{ids['running']}?tab=attempts",
        "logs": f"/jobs/{ids['done']}?tab=logs",
        "checkpoints": f"/jobs/{ids['done']}?tab=checkpoints",
        "description": f"/jobs/{ids['done']}?tab=description",
        "search": f"/jobs/{ids['search']}",
        "exported": f"/jobs/{ids['exported']}",
        "failed": f"/jobs/{ids['failed']}",
        "submit": "/submit?preset=demo/fashion-mnist-pretrain",
        "compare": f"/compare?jobs={ids['done']},{ids['other']}",
        "tokens": "/tokens",
    }
    for look, options in LOOKS.items():
        with visiting(browser, stack.url, **options) as visitor:
            visitor.page.goto(f"{stack.url}/dashboard/login")
            visitor.page.screenshot(path=out / f"login-{look}.png")
            visitor.log_in(stack.token)
            for name, path in pages.items():
                page = visitor.go(path)
                _settle(page, name)
                page.screenshot(path=out / f"{name}-{look}.png", full_page=look == "narrow")
            if visitor.errors:
                raise SystemExit(f"{look}: the pages reported {visitor.errors}")


def _settle(page: Page, name: str) -> None:
    page.wait_for_function("window.socket && window.socket.connected")
    if name in ("job", "compare", "search", "checkpoints"):
        page.locator("[data-points]").first.wait_for()
    elif name == "logs":
        page.locator(".logbox .line").first.wait_for()
    elif name == "submit":
        page.get_by_text("Valid: it can be submitted.").wait_for()
    page.wait_for_timeout(600)  # for fonts and charts to be drawn; nothing is asserted of the picture


def shrink(picture: Path, to: Path) -> None:
    """A copy of at most 256 colours: a third of the size, and no difference that one sees."""
    Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(to, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="Put the two of the README there, shrunk.")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("chromium is missing: apt-get install chromium")
    with (
        running_stack(num_cpus=8, say=print) as (stack, _),
        sync_playwright() as playwright,
        Client(stack.url, stack.token) as client,
    ):
        ids = make_jobs(client)
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGUMENTS))
        take(browser, stack, ids, arguments.out)
        browser.close()
    if arguments.docs is not None:
        for name, to in IN_DOCS.items():
            shrink(arguments.out / f"{name}.png", arguments.docs / to)
    print(f"{len(list(arguments.out.glob('*.png')))} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
