"""The dashboard in Chromium, beside a hundred thousand jobs, a run of a million points and a search of 200 trials.

Measured are the time until a page shows something useful, the time until it answers what a person does, the memory of
the API process for each open page, and what open pages cost everybody else: latencies of the API and of metric ingest,
and images per second of training on the same cores.

Pages that stay open are held by sockets alone (`tests/benchmarks/open_pages.py`): Chromium would take the cores itself.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from configs.states import JobState
from orchestrator.storage.db import Database
from tests.benchmarks import api, http_load
from tests.benchmarks.harness import Row, arguments, progress, report
from tests.benchmarks.http_load import Call
from tests.benchmarks.open_pages import open_pages
from tests.dashboard.conftest import ADMIN, BROWSER_ARGUMENTS, Server, Visitor, serving, visiting
from tests.dashboard.filled import add_attempt, add_curves, add_job, add_many, add_search

_SEQUENCE = iter(range(10, 10_000_000))
NUM_CURVES = 7
"""Of `add_curves`, at every step."""
CHUNK = 10_000


@dataclass(frozen=True)
class Filled:
    """A server whose database is full, and what to look at."""

    server: Server
    long: str
    search: str
    attempt: str
    """Of a job that runs: where metrics go."""


@dataclass(frozen=True)
class View:
    """A page, and what of it is useful to whoever opened it."""

    name: str
    path: str
    useful: str


@contextmanager
def filled(folder: Path, num_jobs: int, num_points: int, num_trials: int) -> Iterator[Filled]:
    """A server on such a database."""
    template = folder / "template.db"
    db = Database(f"sqlite:///{template}")
    db.upgrade()
    db.close()
    with serving(folder / "server", template) as server:
        progress(f"{num_jobs:,} jobs, {num_points:,} points, {num_trials} trials are written")
        add_many(server.db, num_jobs)
        steps = num_points // NUM_CURVES
        long = add_job(server.db, "long", JobState.RUNNING, 600, total_steps=2 * steps, num_attempts=1, step=steps)
        attempt = add_attempt(server.db, long, 1, report_seq=1)
        for first in range(1, steps + 1, CHUNK):
            add_curves(server.db, long, min(first + CHUNK - 1, steps), first=first)
        yield Filled(server, long, add_search(server.db, num_trials), attempt)


def views(of: Filled) -> list[View]:
    """Every page that is measured."""
    both = f"{of.long},{of.server.ids['done']}"
    drawn = "[data-points]:not([data-points='0'])"
    return [
        View("overview", "/overview", "table:has-text('Jobs that run') tbody tr"),
        View("jobs", "/jobs", "table tbody tr"),
        View("job, curves", f"/jobs/{of.long}", drawn),
        View("job, events", f"/jobs/{of.long}?tab=events", "table tbody tr"),
        View("search, trials", f"/jobs/{of.search}", "table:has-text('Trials of the search') tbody tr"),
        View("compare", f"/compare?jobs={both}", drawn),
        View("submit", "/submit?preset=demo/fashion-mnist-pretrain", ".note-box.good"),
        View("tokens", "/tokens", "table tbody tr"),
    ]


def seconds_until(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def paint_s(visitor: Visitor, view: View) -> float:
    """From the address to the first useful sight of the page, by a browser that was there before."""

    def opened() -> None:
        visitor.page.goto(f"{visitor.url}/dashboard{view.path}", wait_until="commit")
        visitor.page.locator(view.useful).first.wait_for()

    return seconds_until(opened)


def interactions(visitor: Visitor, of: Filled) -> dict[str, float]:
    """Seconds until the page shows what was asked of it."""
    page = visitor.go("/jobs")
    row = page.get_by_role("table", name="Jobs").locator("tbody tr").first
    row.wait_for()
    found = {}

    def asked(name: str, ask: Callable[[], object], shows: str) -> None:
        def answered() -> None:
            ask()
            row.filter(has_text=shows).wait_for()

        found[name] = seconds_until(answered)

    asked("jobs: by state", lambda: page.get_by_label("State").select_option("FAILED"), "too-large")
    page.get_by_label("State").select_option("")
    row.filter(has_not_text="too-large").wait_for()
    asked("jobs: by name, written", lambda: page.get_by_label("Name or id").fill("sweep-000042"), "sweep-000042")
    page.get_by_label("Name or id").fill("")
    row.filter(has_not_text="sweep-000042").wait_for()
    asked("jobs: sorted by name", lambda: page.get_by_role("button", name="Job").first.click(), "finetune-flowers")
    page = visitor.go(f"/jobs/{of.long}")
    page.locator("[data-points]").first.wait_for()
    found["job: another tab"] = seconds_until(lambda: _open_tab(page, "Attempts", "Attempt 1"))
    return found


def _open_tab(page: Page, name: str, shows: str) -> None:
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("heading", name=shows).wait_for()


def resident_mib(server: Server) -> float:
    """Memory of the API process."""
    assert server.process is not None
    return float(psutil.Process(server.process.pid).memory_info().rss) / 2**20


def memory_mib(of: Filled, cookie: str, num_pages: int) -> list[float]:
    """What each page takes of the API process: overview, jobs, a job's curves."""
    found = []
    for path in ("/overview", "/jobs", f"/jobs/{of.long}"):
        # What the first one loads stays.
        with open_pages(of.server.url, cookie, path, 2):
            before = resident_mib(of.server)
            with open_pages(of.server.url, cookie, path, num_pages):
                time.sleep(3)  # for feeds to have told all pages; what is measured is a level, not an event
                found.append((resident_mib(of.server) - before) / num_pages)
    return found


def loaded(of: Filled, num_requests: int) -> tuple[float, float]:
    """p99 in ms of a page of jobs, and of a batch of metrics for the run that pages show."""
    port = int(of.server.url.rpartition(":")[2])
    token = {"Authorization": f"Bearer {ADMIN}"}
    listed = http_load.run(port, [Call("GET", "/v1/jobs?limit=50", None, token)] * num_requests, 1)
    secret = {"Authorization": "Bearer worker-secret"}
    batches = api.batches(_SEQUENCE, 200, num_requests)
    path = f"/internal/v1/attempts/{of.attempt}/reports"
    taken_in = http_load.run(port, [Call("POST", path, body, secret) for body in batches], 1)
    return listed.percentile_ms(99), taken_in.percentile_ms(99)


def training_images_per_s(data_root: Path | None, steps: int) -> float:
    """Of our loop on two ranks."""
    from tests.benchmarks.train_throughput import WORLD_SIZE, job, train_ours
    from tests.ranks import run_ranks
    from tests.workers.attempts import make_attempt

    attempt = make_attempt(job(1, steps, "fp32"), WORLD_SIZE)
    with tempfile.TemporaryDirectory(prefix="pw-bench-") as folder:
        return float(run_ranks(WORLD_SIZE, train_ours, attempt, data_root, folder, timeout_s=1800.0)[0].images_per_s)


def beside_pages(
    of: Filled, cookie: str, num_pages: int, num_requests: int, repetitions: int, train: Callable[[], float] | None
) -> list[Row]:
    """What everybody else notices of open pages of the run that is written to, in turn with none open."""
    values: dict[str, list[float]] = {}
    names = ("list jobs p99", "ingest p99")
    for repetition in range(repetitions):
        for pages in (0, num_pages) if repetition % 2 == 0 else (num_pages, 0):
            with open_pages(of.server.url, cookie, f"/jobs/{of.long}", pages):
                measured = dict(zip(names, loaded(of, num_requests), strict=True))
                if train is not None:
                    measured["training"] = train()
            for name, value in measured.items():
                values.setdefault(f"{name}, {pages} pages", []).append(value)
                progress(f"{repetition + 1}/{repetitions}  {name}, {pages} pages: {value:.4g}")
    rows = []
    for name in (*names, *(("training",) if train is not None else ())):
        alone, unit = f"{name}, 0 pages", "images/s" if name == "training" else "ms"
        rows.append(Row(alone, unit, values[alone]))
        beside = f"{name}, {num_pages} pages"
        rows.append(Row(beside, unit, values[beside], alone))
    return rows


def in_browser(of: Filled, browser: Browser, repetitions: int) -> tuple[list[Row], str]:
    """Paint and interaction; and the cookie of whoever logged in."""
    rows = []
    with visiting(browser, of.server.url) as visitor:
        visitor.log_in(ADMIN)
        for view in views(of):
            paint_s(visitor, view)
            values = [paint_s(visitor, view) for _ in range(repetitions)]
            progress(f"{view.name}: {statistics.median(values):.3f} s")
            rows.append(Row(f"{view.name}: first useful paint", "s", values))
        all_answers = [interactions(visitor, of) for _ in range(repetitions)]
        for name in all_answers[0]:
            rows.append(Row(name, "s", [answers[name] for answers in all_answers]))
        if visitor.errors:
            raise SystemExit(f"the pages reported {visitor.errors}")
        cookie = "; ".join(f"{c['name']}={c['value']}" for c in visitor.page.context.cookies())
    return rows, cookie


def main(argv: list[str]) -> int:
    parser = arguments(__doc__ or "", repetitions=3)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--requests", type=int, default=300, help="of each kind, for a p99")
    parser.add_argument("--steps", type=int, default=15, help="of training, for each of its figures; 0: none")
    given = parser.parse_args(argv)
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("chromium is missing: apt-get install chromium")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pw-bench-")))
        of = stack.enter_context(filled(folder, given.jobs, given.points, given.trials))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGUMENTS))
            rows, cookie = in_browser(of, browser, given.repetitions)
            browser.close()
        rows.append(Row("API memory for each page", "MiB", memory_mib(of, cookie, given.pages)))
        train = (lambda: training_images_per_s(given.data_root, given.steps)) if given.steps else None
        rows += beside_pages(of, cookie, given.pages, given.requests, given.repetitions, train)
        notes = {"jobs": given.jobs, "points": given.points, "trials": given.trials, "pages": given.pages}
        title = f"Dashboard: {given.jobs:,} jobs, {given.points:,} points in a run, {given.trials} trials"
        report("browser", title, rows, given.out, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
