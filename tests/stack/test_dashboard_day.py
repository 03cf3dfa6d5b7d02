"""A person's day at the dashboard, on the real stack: everything is done in the browser, and what came of it is asked
of the service."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect
from safetensors.numpy import load_file

from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from orchestrator.fetch import fetch
from orchestrator.schemas import JobPublic
from tests.dashboard.conftest import chromium, visiting
from tests.stack.jobs import finished, pretraining, running_attempt, until

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
_LONG_MS = 280_000
"""Starting workers takes long where much else runs."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def shown_points(page: Page) -> int:
    chart = page.get_by_role("img", name="Chart: Loss")
    return int(chart.get_attribute("data-points") or 0) if chart.count() else 0


def num_parameters(job: JobPublic) -> int:
    """Of the job's model, as it was planned."""
    return int(job.plan["parameters"])


def test_a_day_at_the_dashboard(
    browser: Browser,
    stack: Stack,
    client: Client,
    tmp_path: Path,
) -> None:
    nowhere = {"type": "torchvision", "name": "CIFAR10", "download": "never"}
    failed = client.jobs.create(pretraining(name="nowhere", data={"source": nowhere}, resources__workers=1)).id
    with visiting(browser, stack.url) as visitor:
        page = visitor.page
        # From `patchwork up` to the form.
        page.goto(f"{stack.url}/")
        page.get_by_label("Token").fill(stack.token)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="Overview").wait_for()
        page.get_by_role("link", name="Submit", exact=True).click()
        page.get_by_label("Preset").select_option("demo/fashion-mnist-pretrain")
        page.get_by_role("textbox", name="Name").first.fill("my day")
        page.get_by_label("Total epochs").fill("3")
        page.get_by_text("Data", exact=True).click()
        page.get_by_label("Subset: fraction").fill("0.1")
        page.get_by_text("Training", exact=True).click()
        page.get_by_label("Log every steps").fill("1")
        expect(page.get_by_text("Valid: it can be submitted.")).to_be_visible()
        page.get_by_role("button", name="Submit", exact=True).click()

        # It is watched from the queue to its curves.
        page.get_by_role("heading", name="my day").wait_for()
        job_id = page.url.rpartition("/")[2].partition("?")[0]
        expect(page.locator(".chip.big")).to_have_text("Running", timeout=_LONG_MS)
        until("points of the loss", lambda: shown_points(page) >= 3)

        # Paused: it saves, and leaves. A fork goes on from what it saved, on one worker.
        page.get_by_role("button", name="Pause").click()
        expect(page.locator(".chip.big")).to_have_text("Paused", timeout=_LONG_MS)
        saved = client.checkpoints.find(f"{job_id}/latest")
        page.get_by_role("button", name="Fork").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("textbox", name="Name").fill("my fork")
        dialog.get_by_label("Start from").select_option(saved.id)
        dialog.get_by_label("Changes").fill("resources.workers=1\ncheckpoint.every_epochs=2")
        dialog.get_by_role("button", name="Submit the fork").click()
        page.get_by_role("heading", name="my fork").wait_for()
        fork_id = page.url.rpartition("/")[2].partition("?")[0]

        # Meanwhile the first goes on.
        page.goto(f"{stack.url}/dashboard/jobs/{job_id}")
        page.get_by_role("button", name="Resume").click()
        attempt = running_attempt(client, fork_id, step=saved.step + 1)
        assert (attempt.from_checkpoint, attempt.from_step, attempt.world_size) == (saved.id, saved.step, 1)
        expect(page.locator(".chip.big")).to_have_text("Succeeded", timeout=_LONG_MS)
        job = finished(client, job_id)
        assert [a.exit_reason for a in job.attempts] == ["PAUSED", "COMPLETED"]

        # What it left: lines, attempts, checkpoints.
        page.get_by_role("link", name="Logs", exact=True).click()
        expect(page.locator(".logbox .line").first).to_be_visible()
        page.get_by_label("Search").fill("RANK STARTED")
        expect(page.locator(".logbox .line").filter(has_not_text="Rank started")).to_have_count(0)
        expect(page.locator(".logbox .line")).to_have_count(4)
        page.get_by_label("Search").fill("")
        page.get_by_label("Until (UTC)").fill(f"{job.created_at - timedelta(days=1):%Y-%m-%dT%H:%M:%S}")
        expect(page.get_by_text("No line matches.")).to_be_visible()
        page.get_by_label("Until (UTC)").fill("")
        expect(page.locator(".logbox .line").first).to_be_visible()
        page.get_by_label("Pattern").fill("no line says (this|that)")
        expect(page.get_by_text("No line matches.")).to_be_visible()
        page.get_by_role("link", name="Attempts", exact=True).click()
        expect(page.get_by_text(f"from the checkpoint at step {saved.step:,}")).to_be_visible()
        page.get_by_role("link", name="Checkpoints", exact=True).click()
        expect(page.get_by_role("table", name="Checkpoints of the job")).to_contain_text("latest")
        command = page.locator("code").filter(has_text="patchwork fetch").first.inner_text()
        assert fetch(client, command.split()[-1], tmp_path / "fetched").num_parameters == num_parameters(job)

        # A checkpoint is fetched through the page: exported, and downloaded.
        page.get_by_role("button", name=f"Export the checkpoint of step {job.progress.step:,}").click()
        page.get_by_role("dialog").get_by_label("Format").select_option("timm")
        page.get_by_role("button", name="Export it").click()
        page.get_by_role("heading", name="my day-timm").wait_for()
        with page.expect_download(timeout=_LONG_MS) as download:
            page.get_by_role("table", name="Exported files").get_by_role("link", name="model.safetensors").click(
                timeout=_LONG_MS
            )
        weights = load_file(download.value.path())
        assert weights["blocks.3.attn.qkv.weight"].shape == (192, 64)

        # What it attends to in an image that is dropped on the page.
        page.goto(f"{stack.url}/dashboard/jobs/{job_id}?tab=checkpoints")
        page.get_by_role("button", name=f"Look into the checkpoint of step {job.progress.step:,}").click()
        content = BytesIO()
        Image.linear_gradient("L").save(content, "PNG")
        dropped: list[FilePayload] = [
            {"name": "a ramp.png", "mimeType": "image/png", "buffer": content.getvalue()},
            {"name": "a note.png", "mimeType": "image/png", "buffer": b"this is no image"},
        ]
        files = page.get_by_role("dialog").get_by_label("Choose images")
        files.set_input_files(dropped[1])
        expect(page.get_by_text("a note.png: This is not an image.")).to_be_visible()
        files.set_input_files(dropped)
        page.get_by_role("button", name="Look at the other one").click()
        page.get_by_role("heading", name="my day-images").wait_for()
        rollout = page.get_by_role("img", name="Attention rollout over 1 image.")
        rollout.wait_for(timeout=_LONG_MS)
        assert rollout.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300

        # Side by side with its fork, and why another one failed.
        finished(client, fork_id)
        page.goto(f"{stack.url}/dashboard/compare?jobs={job_id},{fork_id}")
        expect(page.get_by_role("table", name="Where the descriptions differ")).to_contain_text("resources.workers")
        page.goto(f"{stack.url}/dashboard/jobs/{failed}")
        expect(page.get_by_text("DATA_ERROR").first).to_be_visible(timeout=_LONG_MS)
        expect(page.get_by_text("What to do:").first).to_be_visible()
        # The browser notes each of the two files that were no images.
        assert len(visitor.errors) == 2, visitor.errors
        assert all("422" in error for error in visitor.errors), visitor.errors
