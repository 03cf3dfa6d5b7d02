"""Pages in a real browser, on a real server with a filled database."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import insert, select

from configs.states import Desired, JobState
from orchestrator.services.tokens import list_tokens, revoke_token
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, CheckpointRow, JobRow, MetricRow
from tests.dashboard.conftest import ADMIN, Server, Visitor, serving, visiting
from tests.dashboard.filled import add_curves, add_job, add_many, add_search
from tests.orchestrator.rows import add_checkpoint


def until(what: str, probe: Callable[[], Any], deadline_s: float = 20.0) -> Any:
    """The first true result of `probe`."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if found := probe():
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {deadline_s} s: {what}")


def job(db: Database, job_id: str) -> JobRow:
    with db.reader() as session:
        return session.get_one(JobRow, job_id)


def points(page: Page, title: str) -> int:
    """How many points the chart with this title shows."""
    chart = page.get_by_role("img", name=f"Chart: {title}")
    return int(chart.get_attribute("data-points") or 0)


def test_the_overview_says_what_runs_who_waits_and_what_failed(admin: Visitor, server: Server) -> None:
    page = admin.go("/overview")
    running = page.get_by_role("table", name="Jobs that run")
    expect(running.get_by_role("link", name="vit-s16-imagenet")).to_be_visible()
    expect(running).to_contain_text("70 of 100")
    expect(page.get_by_role("table", name="Jobs that wait")).to_contain_text("finetune-flowers")
    failed = page.get_by_role("table", name="Jobs that failed lately")
    expect(failed).to_contain_text("OOM_GPU")
    expect(page.get_by_role("table", name="Nodes of the cluster")).to_contain_text("Alive")
    failed.get_by_role("link", name="too-large").click()
    page.wait_for_url(f"**/jobs/{server.ids['failed']}")
    expect(page.get_by_text("What to do: Halve train.micro_batch_size")).to_be_visible()


def test_jobs_are_filtered_sorted_and_the_address_keeps_that(admin: Visitor) -> None:
    page = admin.go("/jobs")
    table = page.get_by_role("table", name="Jobs")
    page.get_by_label("State").select_option("FAILED")
    expect(table.get_by_role("link", name="vit-s16-imagenet")).to_have_count(0)
    expect(table.get_by_role("link", name="too-large")).to_be_visible()
    page.get_by_label("State").select_option("")
    page.get_by_label("Name or id").fill("vit-")
    expect(table.get_by_role("link", name="too-large")).to_have_count(0)
    expect(table.get_by_role("link", name="vit-ti16-baseline")).to_be_visible()
    table.get_by_role("button", name="Job").click()
    page.wait_for_url(re.compile(r"q=vit-.*sort=name|sort=name.*q=vit-"))
    names = table.locator("a.name")
    expect(names).to_have_text(["vit-s16-imagenet", "vit-ti16-baseline"])
    page.reload()
    expect(page.get_by_label("Name or id")).to_have_value("vit-")
    expect(names).to_have_text(["vit-s16-imagenet", "vit-ti16-baseline"])
    page.get_by_label("Name or id").fill("nothing is called this")
    expect(page.get_by_text("No jobs match.")).to_be_visible()
    page.get_by_label("Labels").fill("team=vision")
    page.get_by_label("Name or id").fill("")
    expect(names).to_have_text(["vit-s16-imagenet"])


def test_curves_grow_while_one_looks(admin: Visitor, server: Server) -> None:
    job_id = add_job(server.db, "live", JobState.RUNNING, num_attempts=1, total_steps=200)
    add_curves(server.db, job_id, 20)
    with server.db.session() as session:
        values = {"job_id": job_id, "number": 1, "state": "RUNNING", "world_size": 1, "created_at": datetime.now(UTC)}
        session.execute(insert(AttemptRow), [{"id": f"att_{job_id[4:]}_0001", "report_seq": 1, **values}])
    page = admin.go(f"/jobs/{job_id}")
    until("the first points", lambda: points(page, "Loss") == 22)
    add_curves(server.db, job_id, 40, first=21)
    with server.db.session() as session:
        session.get_one(AttemptRow, f"att_{job_id[4:]}_0001").report_seq = 2
        session.get_one(JobRow, job_id).step = 40
    until("the points that followed", lambda: points(page, "Loss") == 44)
    expect(page.get_by_text("Step 40 of 200")).to_be_visible()
    page.get_by_label("Smoothing").select_option("0.9")
    page.get_by_label("Vertical axis").select_option("log")
    until("they are still there", lambda: points(page, "Loss") == 44)


def test_every_tab_of_a_job_has_an_address(admin: Visitor, server: Server) -> None:
    page = admin.go(f"/jobs/{server.ids['running']}?tab=attempts")
    expect(page.get_by_text("WORKER_LOST")).to_be_visible()
    expect(page.get_by_text("5 steps after its last checkpoint are done again.")).to_be_visible()
    page.get_by_role("link", name="Checkpoints").click()
    page.wait_for_url("**tab=checkpoints")
    expect(page.get_by_role("table", name="Checkpoints of the job")).to_contain_text("best, latest")
    page.reload()
    expect(page.get_by_role("table", name="Checkpoints of the job")).to_be_visible()
    page.get_by_role("link", name="Description").click()
    expect(page.get_by_label("Resolved description")).to_contain_text("global_batch_size: 64")
    page.get_by_role("link", name="Events").click()
    expect(page.get_by_role("table", name="Events of the job")).to_contain_text("was submitted")


def test_a_job_is_paused_edited_and_cancelled(admin: Visitor, server: Server) -> None:
    job_id = add_job(server.db, "steered", JobState.RUNNING)
    page = admin.go(f"/jobs/{job_id}")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").wait_for()
    assert job(server.db, job_id).desired == Desired.PAUSE
    page.get_by_role("button", name="Edit").click()
    dialog = page.get_by_role("dialog")
    priority = dialog.get_by_role("textbox", name="Priority")
    priority.fill("101")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Give a whole number from 0 to 100.")).to_be_visible()
    priority.fill("90")
    dialog.get_by_role("textbox", name="Labels").fill("team=vision\npaper=yes")
    page.get_by_role("button", name="Save").click()
    until("the change is stored", lambda: job(server.db, job_id).priority == 90)
    assert job(server.db, job_id).labels == {"team": "vision", "paper": "yes"}
    expect(page.get_by_text("paper=yes", exact=True)).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the job").click()
    until("its end is asked for", lambda: job(server.db, job_id).desired == Desired.STOP)
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)


def test_a_job_is_forked_with_changes(admin: Visitor, server: Server) -> None:
    page = admin.go(f"/jobs/{server.ids['done']}")
    page.get_by_role("button", name="Fork").click()
    page.get_by_role("textbox", name="Name").fill("forked")
    page.get_by_label("Changes").fill("optim.lr=0.5\nnonsense=1")
    page.get_by_role("button", name="Submit the fork").click()
    expect(page.get_by_text("unknown field")).to_be_visible()
    page.get_by_label("Changes").fill("optim.lr=0.5")
    page.get_by_role("button", name="Submit the fork").click()
    expect(page.get_by_role("heading", name="forked")).to_be_visible()
    page.get_by_role("link", name="Events").click()
    expect(page.get_by_role("table", name="Events of the job")).to_contain_text(f"A fork of {server.ids['done']}")


def test_a_job_is_submitted_from_a_preset_after_mending_what_is_wrong(admin: Visitor, server: Server) -> None:
    page = admin.go("/submit")
    page.get_by_label("Preset").select_option("demo/fashion-mnist-pretrain")
    expect(page.get_by_text("Valid: it can be submitted.")).to_be_visible()
    page.get_by_label("Learning rate").fill("fast")
    expect(page.get_by_text("1 thing to mend.")).to_be_visible()
    expect(page.get_by_role("button", name="Submit", exact=True)).to_be_disabled()
    page.get_by_label("Learning rate").fill("0.002")
    page.get_by_role("textbox", name="Name").first.fill("from the form")
    page.get_by_text("Optimizer", exact=True).click()
    page.get_by_label("Weight decay").fill("0.1")
    expect(page.get_by_text("Valid: it can be submitted.")).to_be_visible()
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.get_by_role("heading", name="from the form")).to_be_visible()
    with server.db.reader() as session:
        row = session.scalars(select(JobRow).where(JobRow.name == "from the form")).one()
    assert row.submitted["spec"] == {"preset": "demo/fashion-mnist-pretrain"}
    assert row.submitted["overrides"]["optim.lr"] == "0.002"
    assert b'"weight_decay":0.1' in row.spec_json


def test_what_is_written_stays_while_a_preset_is_chosen(admin: Visitor) -> None:
    page = admin.go("/submit")
    name, rate = page.get_by_role("textbox", name="Name").first, page.get_by_label("Learning rate")
    rate.fill("0.004")
    # Faster than the preset's fields can come.
    page.get_by_label("Preset").select_option("demo/fashion-mnist-pretrain")
    name.fill("mine")
    name.blur()
    expect(page.get_by_text("Valid: it can be submitted.")).to_be_visible()
    expect(page.get_by_label("Total epochs")).not_to_have_value("")
    # Another kind has other fields; those it has too keep what was written.
    page.get_by_label("Kind of job").select_option("finetune")
    expect(page.get_by_label("Checkpoint to start from")).to_be_visible()
    expect(page.get_by_label("Preset")).to_have_value("")
    expect(name).to_have_value("mine")
    expect(rate).to_have_value("0.004")


def test_jobs_are_compared_by_curves_values_and_descriptions(admin: Visitor, server: Server) -> None:
    page = admin.go("/jobs?q=vit-")
    for name in ("vit-s16-imagenet", "vit-ti16-baseline"):
        page.get_by_label(f"Select {name}").check()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/compare?jobs=*")
    until("both curves", lambda: points(page, "train/loss") == 170)
    expect(page.get_by_role("table", name="Jobs compared")).to_contain_text("83.43 %")
    differences = page.get_by_role("table", name="Where the descriptions differ")
    expect(differences.locator("tbody tr")).to_have_count(1)
    page.get_by_label("Horizontal axis").select_option("images")
    page.get_by_label("Add a chart").select_option("train/grad_norm")
    until("the third chart", lambda: points(page, "train/grad_norm") == 170)
    assert "x=images" in page.url


def test_several_jobs_are_cancelled_at_once(admin: Visitor, server: Server) -> None:
    ids = [add_job(server.db, f"bulk-{i}", JobState.QUEUED) for i in range(3)]
    done = add_job(server.db, "bulk-done", JobState.SUCCEEDED)
    page = admin.go("/jobs?q=bulk-")
    expect(page.get_by_role("table", name="Jobs").locator("tbody tr")).to_have_count(4)
    page.get_by_label("Select every job on this page").check()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancel: asked for 3 jobs.")).to_be_visible()
    expect(page.get_by_text(f"Cancel was refused for {done}")).to_be_visible()
    assert all(job(server.db, job_id).desired == Desired.STOP for job_id in ids)


def test_a_viewer_may_look_but_not_act(browser: Browser, server: Server) -> None:
    with visiting(browser, server.url) as visitor:
        visitor.log_in(server.token("viewer"))
        page = visitor.go(f"/jobs/{server.ids['running']}")
        expect(page.get_by_role("link", name="Logs")).to_be_visible()
        for name in ("Pause", "Fork", "Edit", "Cancel"):
            expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)
        nav = page.get_by_role("navigation", name="Pages")
        expect(nav.get_by_role("link")).to_have_text(["Overview", "Jobs", "Compare"])
        visitor.page.goto(f"{server.url}/dashboard/submit")
        expect(page.get_by_text("You may look, but not submit.")).to_be_visible()
        visitor.page.goto(f"{server.url}/dashboard/tokens")
        expect(page.get_by_text("Tokens are for administrators.")).to_be_visible()


def test_a_token_is_made_used_and_revoked_and_its_open_page_ends(
    browser: Browser, admin: Visitor, server: Server
) -> None:
    page = admin.go("/tokens")
    page.get_by_label("Name").fill("guest")
    page.get_by_label("Role").select_option("viewer")
    page.get_by_role("button", name="Make the token").click()
    token = page.locator("#new-token").inner_text()
    with visiting(browser, server.url) as guest:
        guest.log_in(token, "/jobs")
        expect(guest.page.get_by_role("heading", name="Jobs")).to_be_visible()
        page.get_by_role("button", name="Revoke guest").click()
        page.get_by_role("button", name="Revoke", exact=True).click()
        expect(page.get_by_text("The token was revoked.")).to_be_visible()
        guest.page.wait_for_url("**/login?next=*", timeout=30_000)
    assert any(t.name == "guest" and t.revoked_at for t in list_tokens(server.db).items)


def test_an_action_with_a_token_revoked_meanwhile_is_refused(browser: Browser, server: Server) -> None:
    job_id = add_job(server.db, "out of reach", JobState.RUNNING)
    with visiting(browser, server.url) as visitor:
        visitor.log_in(server.token("member"))
        page = visitor.go(f"/jobs/{job_id}")
        page.get_by_role("button", name="Pause").wait_for()
        newest = list_tokens(server.db).items[0]
        revoke_token(server.db, newest.id)
        page.get_by_role("button", name="Pause").click()
        page.wait_for_url("**/login?next=*")
    assert job(server.db, job_id).desired == Desired.RUN


HOSTILE = (
    """<img src=x onerror="window.owned=1"></script><script>window.owned=2</script>"""
    """{{constructor.constructor('window.owned=3')()}}`${window.owned=4}"""
)


def test_text_of_users_is_never_more_than_text(browser: Browser, server: Server) -> None:
    job_id = add_job(
        server.db,
        HOSTILE[:128],
        JobState.FAILED,
        reason="USER_ERROR",
        message=HOSTILE,
        project=HOSTILE[:64],
        created_by=HOSTILE[:64],
        labels={HOSTILE[:100]: HOSTILE},
        submitted={"spec": {"kind": "pretrain", "name": HOSTILE}, "overrides": {"name": HOSTILE}},
        ended_at=datetime.now(UTC),
    )
    with server.db.session() as session:
        at = datetime.now(UTC)
        values = {"job_id": job_id, "step": 1, "attempt": 1, "value": 1.0, "at": at}
        session.execute(insert(MetricRow), [{"name": HOSTILE[:128], **values}, {"name": "train/loss", **values}])
    with visiting(browser, server.url) as visitor:
        visitor.log_in(ADMIN)
        tabs = [f"/jobs/{job_id}?tab={tab}" for tab in ("curves", "attempts", "checkpoints", "description", "events")]
        compare = f"/compare?jobs={job_id},{server.ids['done']}"
        for path in ("/overview", "/jobs?q=img", *tabs, compare, f"/submit?from={job_id}", f"/jobs?label={HOSTILE}"):
            page = visitor.go(path)
            page.wait_for_function("window.socket && window.socket.connected")
            if "/jobs?q" in path:
                expect(page.get_by_role("link", name=HOSTILE[:60])).to_be_visible()
            if "tab=curves" in path:
                until("a chart", partial(points, page, "Loss"))
                page.get_by_role("img", name="Chart: Loss").hover()
            assert page.evaluate("window.owned") is None, path
            assert page.locator("img[src='x']").count() == 0, path
        assert not [error for error in visitor.errors if "Content Security Policy" in error], "something was tried"


def test_a_server_that_restarts_is_found_again_with_what_was_missed(
    browser: Browser, tmp_path: Path, sqlite_template: Path
) -> None:
    with serving(tmp_path / "restarted", sqlite_template) as server, visiting(browser, server.url) as visitor:
        visitor.log_in(ADMIN)
        page = visitor.go(f"/jobs/{server.ids['running']}")
        expect(page.get_by_text("Step 70 of 100")).to_be_visible()
        server.stop()
        expect(page.locator("#popup")).to_be_visible()
        with server.db.session() as session:
            session.get_one(JobRow, server.ids["running"]).step = 88
        server.start()
        expect(page.get_by_text("Step 88 of 100")).to_be_visible(timeout=30_000)


def test_a_hundred_thousand_jobs_are_listed_as_fast_as_a_few(
    browser: Browser, tmp_path: Path, sqlite_template: Path
) -> None:
    with serving(tmp_path / "many", sqlite_template) as server, visiting(browser, server.url) as visitor:
        add_many(server.db, 100_000)
        visitor.log_in(ADMIN)
        page = visitor.go("/jobs")
        table = page.get_by_role("table", name="Jobs")
        expect(page.get_by_text("1 to 50 of 100,004")).to_be_visible()
        started = time.monotonic()
        page.get_by_role("button", name="Next page").click()
        expect(page.get_by_text("51 to 100 of 100,004")).to_be_visible()
        assert time.monotonic() - started < 5, "a page is read through an index"
        started = time.monotonic()
        page.get_by_label("Name or id").fill("sweep-099999")
        expect(table.locator("a.name")).to_have_text(["sweep-099999"])
        assert time.monotonic() - started < 10
        page.get_by_label("Name or id").fill("")
        page.get_by_label("Order").select_option("name")
        expect(table.locator("a.name").first).to_have_text("finetune-flowers")
        page.get_by_role("button", name="Next page").click()
        page.get_by_role("button", name="Previous page").click()
        expect(table.locator("a.name").first).to_have_text("finetune-flowers")


def test_pages_fit_a_narrow_screen(browser: Browser, server: Server) -> None:
    with visiting(browser, server.url, viewport={"width": 390, "height": 844}) as visitor:
        visitor.log_in(ADMIN)
        running = server.ids["running"]
        tabs = [f"/jobs/{running}?tab={tab}" for tab in ("curves", "attempts", "logs", "checkpoints", "description")]
        for path in (
            "/overview",
            "/jobs",
            *tabs,
            f"/compare?jobs={running},{server.ids['done']}",
            "/submit",
            "/tokens",
        ):
            page = visitor.go(path)
            page.wait_for_function("window.socket && window.socket.connected")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path


def test_nothing_is_loaded_from_another_host(browser: Browser, server: Server) -> None:
    with visiting(browser, server.url) as visitor:
        asked: list[str] = []
        visitor.page.on("request", lambda request: asked.append(request.url))
        visitor.log_in(ADMIN)
        visitor.go(f"/jobs/{server.ids['running']}")
        until("a chart", lambda: points(visitor.page, "Loss") > 0)
        assert asked
        assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []


def test_checkpoints_are_pinned_and_exported_from_the_page(admin: Visitor, server: Server) -> None:
    page = admin.go(f"/jobs/{server.ids['running']}?tab=checkpoints")
    page.get_by_role("button", name="Pin the checkpoint of step 20").click()
    page.get_by_role("button", name="Unpin the checkpoint of step 20").wait_for()
    row = page.get_by_role("row").filter(has=page.get_by_role("button", name="Unpin"))
    expect(row).to_contain_text("pinned")
    with server.db.reader() as session:
        pinned = session.scalars(select(CheckpointRow).where(CheckpointRow.pinned.is_(True))).one()
    assert (pinned.job_id, pinned.step) == (server.ids["running"], 20)
    row.get_by_role("button", name="Unpin").click()
    expect(page.get_by_role("button", name="Unpin the checkpoint of step 20")).to_have_count(0)

    for fmt in ("safetensors", "timm", "transformers", "torchvision", "npz"):
        admin.go(f"/jobs/{server.ids['running']}?tab=checkpoints")
        page.get_by_role("button", name="Export the checkpoint of step 20").click()
        page.get_by_role("dialog").get_by_label("Format").select_option(fmt)
        page.get_by_role("button", name="Export it").click()
        page.get_by_role("heading", name=f"vit-s16-imagenet-{fmt}").wait_for()
        assert page.url.partition("?")[0].startswith(f"{server.url}/dashboard/jobs/job_")
        made = job(server.db, page.url.rpartition("/")[2].partition("?")[0])
        assert (made.kind, made.init_from, made.submitted["spec"]["format"]) == ("export", pinned.id, fmt)


def test_a_viewer_cannot_pin_or_export(browser: Browser, server: Server) -> None:
    with visiting(browser, server.url) as visitor:
        visitor.log_in(server.token("viewer"))
        page = visitor.go(f"/jobs/{server.ids['running']}?tab=checkpoints")
        expect(page.get_by_role("table", name="Checkpoints of the job")).to_contain_text("best, latest")
        assert page.get_by_role("button", name=re.compile("Pin|Export")).count() == 0
        assert visitor.errors == []


def test_the_family_of_a_job_is_drawn_and_told(admin: Visitor, server: Server) -> None:
    parent = add_job(server.db, "ancestor", JobState.SUCCEEDED, 900)
    checkpoint = add_checkpoint(server.db, parent, 40)
    middle = add_job(server.db, "descendant", JobState.SUCCEEDED, 800, resume_from=checkpoint)
    add_job(server.db, "again", JobState.QUEUED, 700, retry_of=middle)
    page = admin.go(f"/jobs/{middle}?tab=checkpoints")
    told = page.get_by_role("list", name="Who came of whom").get_by_role("listitem")
    expect(told).to_have_text(
        [re.compile("descendant.*goes on from.*ancestor.*at step 40"), re.compile("again.*retry")]
    )
    chart = page.get_by_role("img", name="Chart: Jobs that came of one another")
    until("its three jobs are drawn", lambda: chart.get_attribute("data-points") == "3")
    told.get_by_role("link", name="ancestor").click()
    expect(page.get_by_role("heading", name="ancestor")).to_be_visible()


def test_a_search_shows_its_best_its_plots_and_its_trials(admin: Visitor, server: Server) -> None:
    page = admin.go(f"/jobs/{add_search(server.db, 12)}")
    table = page.get_by_role("table", name="Trials of the search")
    expect(table.get_by_role("row")).to_have_count(13)
    best = page.locator(".card").filter(has=page.get_by_role("heading", name="Best so far"))
    expect(best).to_contain_text("optim.name=sgd")
    for title, number in (("History", 12), ("Curves", 120), ("Parallel coordinates", 12)):
        chart = page.get_by_role("img", name=f"Chart: {title}")
        until(title, lambda chart=chart, number=number: chart.get_attribute("data-points") == str(number))
    expect(page.get_by_role("img", name="Chart: Importances")).to_be_hidden()
    best.get_by_role("link", name="Trial 7").click()
    expect(page.get_by_role("heading", name="lr-7")).to_be_visible()
