"""The controller process: `python -m orchestrator.control.controller`.

    main thread   holds the leadership lease and says that it lives
    scheduler     looks at the cluster, then at the queue
    reconcilers   look at jobs that are due
    sweeper       removes uploads that were abandoned or are imported
    sinks         one for each: write metrics on to TensorBoard's files, MLflow, W&B

Any number of controllers may run; one leads, the others wait for its lease to end. Jobs are guarded by leases of their
own, so even two that both think they lead do nothing twice.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TypeVar

import structlog

from orchestrator.control.launcher import Launcher, LauncherError
from orchestrator.control.leases import give_up_leadership, hold_leadership
from orchestrator.control.queue_view import beat, schedule_queue, store_cluster
from orchestrator.control.ray_rest import RayLauncher
from orchestrator.control.reconciler import Reconciler, utc_now
from orchestrator.control.sinks.configured import configured_sinks
from orchestrator.control.sinks.deliver import Deliverer, forget_other_sinks
from orchestrator.control.sinks.sink import Sink
from orchestrator.control.sweep_uploads import sweep_images, sweep_uploads
from orchestrator.settings import Settings, load_settings
from orchestrator.storage.db import Database, is_unavailable
from orchestrator.storage.store import ObjectStore, S3Store, StoreError, StoreUnfit

log = structlog.get_logger(__name__)
NUM_RECONCILERS = 4
IDLE_S = 0.2
CLUSTER_EVERY_S = 2.0
SCHEDULE_EVERY_S = 0.3
LEAD_EVERY_S = 2.0
SWEEP_EVERY_S = 60.0
SINKS_EVERY_S = 2.0
AFTER_ERROR_S = 1.0
JOIN_S = 30.0
_Result = TypeVar("_Result")


class Controller:
    """Scheduler and reconcilers in threads, active while this process leads."""

    def __init__(
        self,
        db: Database,
        launcher: Launcher,
        store: ObjectStore,
        settings: Settings,
        num_reconcilers: int = NUM_RECONCILERS,
    ) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self._db, self._launcher, self._store, self._settings = db, launcher, store, settings
        self._token = secrets.token_hex(16)
        self._num_reconcilers = num_reconcilers
        self._sinks = configured_sinks(settings, store)
        self._reconciler: Reconciler | None = None
        """Only while this process leads."""
        self._stop = threading.Event()
        self._lookout = threading.Lock()

    @property
    def leads(self) -> bool:
        return self._reconciler is not None

    def stop(self) -> None:
        """Make `run` return soon. May be called from a signal handler or another thread."""
        self._stop.set()

    def run(self) -> None:
        """Lead, schedule and reconcile until `stop`; then hand the leadership over at once."""
        threads = [
            threading.Thread(target=self._schedule, name="scheduler"),
            threading.Thread(target=self._sweep, name="sweeper"),
        ]
        threads += [
            threading.Thread(target=self._reconcile, name=f"reconciler-{i}") for i in range(self._num_reconcilers)
        ]
        writers = [
            threading.Thread(target=self._write_on, args=(sink,), name=f"sink-{sink.name}") for sink in self._sinks
        ]
        for thread in [*threads, *writers]:
            thread.daemon = True
            thread.start()
        while not self._stop.is_set():
            self._survive("leader", self._lead)
            self._stop.wait(LEAD_EVERY_S)
        self._reconciler = None
        deadline = time.monotonic() + JOIN_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._survive("leader", lambda: give_up_leadership(self._db, self._token))
        # After that: nobody waits for one who waits for another service, and whatever it leaves half done comes again.
        for thread in writers:
            thread.join(max(0.0, deadline - time.monotonic()))
        log.info("Controller stopped.", owner=self.owner)

    def _lead(self) -> None:
        now = utc_now()
        try:
            leads = hold_leadership(self._db, self.owner, self._token, now, self._settings.lease_s)
            if leads:
                beat(self._db, now)
        except Exception:
            # If the database does not answer, we do not know that we still lead.
            self._set_leading(False)
            raise
        self._set_leading(leads)

    def _set_leading(self, leads: bool) -> None:
        if leads == self.leads:
            return
        log.info("Leadership taken." if leads else "Leadership lost.", owner=self.owner)
        # Made anew with each leadership: patience with silent attempts counts from now.
        parts = (self._db, self._launcher, self._store, self._settings)
        self._reconciler = Reconciler(*parts, owner=self.owner) if leads else None

    def _schedule(self) -> None:
        looked_at = -CLUSTER_EVERY_S
        while not self._stop.is_set():
            if self.leads:
                if time.monotonic() - looked_at >= CLUSTER_EVERY_S:
                    self._survive("cluster", self._look_at_cluster)
                    looked_at = time.monotonic()
                self._survive("scheduler", lambda: schedule_queue(self._db, utc_now()))
            self._stop.wait(SCHEDULE_EVERY_S)

    def _sweep(self) -> None:
        while not self._stop.is_set():
            if self.leads:
                self._survive("sweeper", self._sweep_uploads)
                self._survive("sweeper", self._sweep_images)
            self._stop.wait(SWEEP_EVERY_S if self.leads else SCHEDULE_EVERY_S)

    def _sweep_uploads(self) -> None:
        sweep_uploads(self._db, self._store, utc_now(), self._settings.upload_expires_s)

    def _sweep_images(self) -> None:
        sweep_images(self._db, self._store, utc_now())

    def _write_on(self, sink: Sink) -> None:
        """A thread of its own for each sink: one that hangs holds up nobody."""
        deliverer: Deliverer | None = None
        while not self._stop.is_set():
            if not self.leads:
                deliverer = None
            elif deliverer is None:
                # What failed under another leader is tried again at once.
                deliverer = Deliverer(self._db, sink)
                self._survive(f"sink-{sink.name}", lambda: forget_other_sinks(self._db, {s.name for s in self._sinks}))
            else:
                look = partial(deliverer.look, utc_now(), self._may_write)
                self._survive(f"sink-{sink.name}", look)
            self._stop.wait(SINKS_EVERY_S)

    def _may_write(self) -> bool:
        return self.leads and not self._stop.is_set()

    def _look_at_cluster(self) -> None:
        try:
            status = self._launcher.cluster()
        except LauncherError as error:
            store_cluster(self._db, None, str(error), utc_now())
        else:
            store_cluster(self._db, status, "", utc_now())

    def _reconcile(self) -> None:
        """One thread at a time looks out for a job that is due; the others work, or sleep until it has found one."""
        while not self._stop.is_set():
            with self._lookout:
                reconciler = self._reconciler
                claim = None if reconciler is None else self._survive("reconciler", reconciler.claim)
                if claim is None:
                    self._stop.wait(IDLE_S)
            if reconciler is not None and claim is not None:
                self._survive("reconciler", partial(reconciler.look_at, claim))

    def _survive(self, what: str, step: Callable[[], _Result]) -> _Result | None:
        """Do one step of a loop that must live."""
        try:
            return step()
        except Exception as error:
            if is_unavailable(error):
                log.warning("The database is busy or away.", loop=what, detail=str(error))
            else:
                log.exception("A loop's step failed.", loop=what)
            self._stop.wait(AFTER_ERROR_S)
            return None


def wait_for_store(store: S3Store, stop: threading.Event) -> None:
    """Return once the object store has passed its self-test, or `stop` is set.

    Raises:
        StoreUnfit: it answers, but does not keep what checkpoints rely on.
    """
    while not stop.is_set():
        try:
            store.create_bucket()
            store.self_test()
            return
        except StoreUnfit:
            raise
        except StoreError as error:
            log.warning("The object store is not ready.", detail=str(error))
            stop.wait(1.0)


def main() -> int:
    """Run a controller until SIGTERM or SIGINT. Returns the exit status."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    settings = load_settings()
    stop = threading.Event()
    controllers: list[Controller] = []

    def leave(_signal: int, _frame: FrameType | None) -> None:
        stop.set()
        for controller in controllers:
            controller.stop()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    db = Database(settings.database_url)
    db.upgrade()
    store = S3Store.from_settings(settings)
    try:
        wait_for_store(store, stop)
    except StoreUnfit as error:
        log.error("The object store must not hold checkpoints.", detail=str(error))
        return 1
    with RayLauncher.from_settings(settings) as launcher:
        controllers.append(Controller(db, launcher, store, settings))
        if not stop.is_set():
            controllers[0].run()
    db.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
