"""The embedded parts: nothing survives its owner, one stack per directory, `up` and `down` on real parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from orchestrator.embedded.data_dir import AlreadyRunning, DataDir, RunFile
from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.embedded.ports import free_ports
from orchestrator.embedded.processes import ChildProcess, ProcessFailed
from orchestrator.embedded.ray_head import RayHead
from orchestrator.embedded.server import ServerProcess

# A command whose children leave its session, ignore SIGTERM and write their pids down.
STUBBORN = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    children = [subprocess.Popen([sys.executable, "-c", code], start_new_session=True) for _ in range(2)]
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(" ".join(str(p.pid) for p in (*children,)) + f" {os.getpid()}")
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(600)
    """
)


def eventually(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_in(path: Path) -> list[int]:
    eventually(path.exists)
    return [int(word) for word in path.read_text().split()]


# -- guardian --------------------------------------------------------------------------------------------------------
def test_stopping_ends_everything_below_and_removes_what_was_named(tmp_path: Path) -> None:
    left_over = tmp_path / "left-over"
    left_over.mkdir()
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "pids")]
    child = ChildProcess("stubborn", command, tmp_path / "log", os.environ, remove=[left_over])
    pids = pids_in(tmp_path / "pids")
    assert all(map(alive, pids))
    child.stop(grace_s=0.2)
    assert not any(map(alive, [*pids, child.pid]))
    assert not left_over.exists()


def test_nothing_survives_an_owner_that_is_killed(tmp_path: Path) -> None:
    owner_code = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from orchestrator.embedded.processes import ChildProcess
        child = ChildProcess("stubborn", sys.argv[1:], Path(sys.argv[-1] + ".log"), os.environ)
        time.sleep(600)
        """
    )
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "pids")]
    owner = subprocess.Popen([sys.executable, "-c", owner_code, *command], cwd=Path(__file__).parents[2])
    pids = pids_in(tmp_path / "pids")
    owner.kill()
    owner.wait()
    eventually(lambda: not any(map(alive, pids)))


def test_a_command_that_ends_takes_its_children_along_and_leaves_its_exit_code(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); sys.exit(7)"
    child = ChildProcess("brief", [sys.executable, "-c", code], tmp_path / "log", os.environ)
    eventually(lambda: child.exit_code is not None)
    assert child.exit_code == 7
    assert not alive(int((tmp_path / "log").read_text().split()[0]))
    with pytest.raises(ProcessFailed, match="brief ended with exit code 7"):
        child.check_alive()
    child.stop(1.0)


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text("{}")
    server = ServerProcess("broken", "orchestrator.no_such_module", settings, tmp_path / "log", "http://127.0.0.1:9/")
    server.start()
    with pytest.raises(ProcessFailed, match=r"No module named orchestrator\.no_such_module"):
        server.wait_ready()
    server.stop()


# -- data directory --------------------------------------------------------------------------------------------------
def test_a_directory_has_one_stack_and_the_second_learns_of_the_first(tmp_path: Path) -> None:
    first, second = DataDir(tmp_path / "d"), DataDir(tmp_path / "d")
    assert second.running() is None
    first.lock()
    first.write_run(RunFile(pid=4711, url="http://127.0.0.1:8400", state="ready"))
    with pytest.raises(AlreadyRunning, match=r"pid 4711, http://127\.0\.0\.1:8400"):
        second.lock()
    running = second.running()
    assert running is not None
    assert running.pid == 4711
    first.unlock()
    assert second.running() is None
    second.lock()
    second.unlock()


def test_what_a_killed_stack_said_of_itself_is_not_taken_for_the_next_ones_word(tmp_path: Path) -> None:
    """`patchwork down` sends its signal to the pid it finds."""
    killed, following = DataDir(tmp_path / "d"), DataDir(tmp_path / "d")
    killed.lock()
    killed.write_run(RunFile(pid=1, url="", state="ready"))
    assert killed._lock is not None
    killed._lock.close()  # as the kernel does
    following.lock()
    assert DataDir(tmp_path / "d").running() is None
    following.unlock()


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server takes its port some time after it was chosen: until then only we know that it is taken."""
    monkeypatch.setattr("orchestrator.embedded.ports._HIGH", 15000 + 2000)
    given = [free_ports(1)[0] for _ in range(120)]
    assert len(set(given)) == 120


# -- object store ----------------------------------------------------------------------------------------------------
@pytest.fixture
def short_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pw-t-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.stack
def test_the_store_keeps_its_objects_and_its_directory_to_itself(short_dir: Path) -> None:
    store = ObjectStoreServer(short_dir / "store")
    store.start()
    try:
        store.wait_ready()
        store.client().put_object(Bucket=store.bucket, Key="kept", Body=b"bytes")
        with pytest.raises(RuntimeError, match="another object store runs on"):
            ObjectStoreServer(short_dir / "store").start()
        assert httpx.get(store.endpoint + "/patchwork/kept", trust_env=False).status_code == 403
        assert (short_dir / "store" / "credentials.json").stat().st_mode & 0o777 == 0o600
        listening = {
            c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and _is_below(c.pid, store.pid)
        }
        assert listening == {"127.0.0.1"}
        os.kill(store.pid, signal.SIGKILL)  # the guardian: the server dies with it
        eventually(lambda: store.exit_code is not None)
    finally:
        store.stop()
    again = ObjectStoreServer(short_dir / "store")
    again.start()
    try:
        again.wait_ready()
        assert (again.access_key, again.secret_key) == (store.access_key, store.secret_key)
        assert again.client().get_object(Bucket=again.bucket, Key="kept")["Body"].read() == b"bytes"
    finally:
        again.stop()


def _is_below(pid: int | None, ancestor: int) -> bool:
    try:
        return pid is not None and ancestor in [p.pid for p in psutil.Process(pid).parents()]
    except psutil.NoSuchProcess:
        return False


# -- Ray -------------------------------------------------------------------------------------------------------------
@pytest.mark.stack
def test_the_ray_head_wants_its_token_listens_on_loopback_and_finds_the_workers_package(short_dir: Path) -> None:
    node_file = short_dir / "node.json"
    node_file.write_text("{}")
    head = RayHead(short_dir / "ray.log", node_file=node_file, num_cpus=3)
    head.start()
    try:
        head.wait_ready()
        temp_dir = head.temp_dir
        assert temp_dir is not None
        assert httpx.get(head.address + "/api/jobs/", trust_env=False).status_code == 401
        listening = {
            c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and _is_below(c.pid, head.pid)
        }
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
        script = short_dir / "entry.py"
        script.write_text(
            "import os, ray, workers\n"
            "ray.init(logging_level='ERROR')\n"
            "f = ray.remote(lambda: (__import__('workers').__file__, os.environ['PATCHWORK_NODE_FILE']))\n"
            "print('RESULT', ray.get(f.remote()), ray.cluster_resources()['CPU'], flush=True)\n"
        )
        with httpx.Client(base_url=head.address, headers=head.headers, trust_env=False, timeout=30.0) as ray:
            ray.post("/api/jobs/", json={"entrypoint": f"python {script}", "submission_id": "t"}).raise_for_status()
            eventually(lambda: ray.get("/api/jobs/t").json()["status"] in ("SUCCEEDED", "FAILED"), timeout_s=120.0)
            logs = ray.get("/api/jobs/t/logs").json()["logs"]
        assert "RESULT" in logs, logs
        assert str(node_file) in logs
        assert "3.0" in logs
        below = [p.pid for p in psutil.Process(head.pid).children(recursive=True)]
    finally:
        head.stop()
    assert not any(map(alive, below))
    assert not temp_dir.exists()


# -- up and down -----------------------------------------------------------------------------------------------------
def patchwork(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PATCHWORK_")} | {"PATCHWORK_DATA_DIR": str(folder)}
    command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
    return subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.stack
def test_up_serves_heals_refuses_a_second_and_goes_down_without_a_trace(short_dir: Path) -> None:
    done = patchwork(short_dir, "up", "--detach", "--port", "0", "--cpus", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Patchwork is ready at http://127.0.0.1:" in done.stdout
    try:
        client_file = short_dir / "client.json"
        assert client_file.stat().st_mode & 0o777 == 0o600
        for name in ("settings.json", "node.json"):
            assert (short_dir / name).stat().st_mode & 0o777 == 0o600
        run = DataDir(short_dir).running()
        assert run is not None
        owner = psutil.Process(run.pid)
        below = owner.children(recursive=True)
        assert json.loads(client_file.read_text())["token"] not in " ".join(" ".join(p.cmdline()) for p in below)

        second = patchwork(short_dir, "up", "--port", "0")
        assert second.returncode == 1
        assert f"pid {run.pid}, {run.url}" in second.stderr

        cluster = patchwork(short_dir, "cluster", "--json")
        assert json.loads(cluster.stdout)["cluster"]["reachable"] is True, cluster.stderr
        assert patchwork(short_dir, "list").stdout.strip() == "No jobs."

        api = next(p for p in below if "orchestrator.api.server" in p.cmdline() and p.ppid() != run.pid)
        api.kill()
        eventually(lambda: not alive(api.pid))
        eventually(lambda: patchwork(short_dir, "cluster").returncode == 0, timeout_s=60.0)
        below = owner.children(recursive=True)
    finally:
        down = patchwork(short_dir, "down")
    assert down.returncode == 0, down.stderr
    assert "Stopped." in down.stdout
    assert not [p for p in below if alive(p.pid)]
    assert DataDir(short_dir).running() is None
    assert "Nothing runs" in patchwork(short_dir, "down").stdout


@pytest.mark.stack
def test_ctrl_c_while_starting_leaves_nothing(short_dir: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PATCHWORK_")}
    command = [sys.executable, "-m", "orchestrator.cli.main", "up", "--port", "0", "--data-dir", str(short_dir)]
    with (short_dir / "out").open("wb") as out:
        up = subprocess.Popen(command, env=env, cwd=Path(__file__).parents[2], stdout=out, stderr=subprocess.STDOUT)
    eventually(lambda: b"Ray: starting" in (short_dir / "out").read_bytes())
    eventually(lambda: len(psutil.Process(up.pid).children(recursive=True)) > 3)
    below = psutil.Process(up.pid).children(recursive=True)
    up.send_signal(signal.SIGINT)
    assert up.wait(60) == 0, (short_dir / "out").read_text()
    assert not [p for p in below if alive(p.pid)]
    assert "Nothing is left running" in (short_dir / "out").read_text()


@pytest.mark.stack
def test_ctrl_c_while_waiting_for_a_detached_stack_stops_it(short_dir: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PATCHWORK_")}
    folder = short_dir / "data"
    command = [sys.executable, "-m", "orchestrator.cli.main", "up", "--detach", "--port", "0", "--data-dir"]
    with (short_dir / "out").open("wb") as out:
        waiting = subprocess.Popen(
            [*command, str(folder)],
            env=env,
            cwd=Path(__file__).parents[2],
            stdout=out,
            stderr=subprocess.STDOUT,
            # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    eventually(lambda: b"Ray: starting" in (short_dir / "out").read_bytes(), timeout_s=90.0)
    run = DataDir(folder).running()
    assert run is not None
    below = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(90) == 130, (short_dir / "out").read_text()
    assert "Interrupted" in (short_dir / "out").read_text()
    assert DataDir(folder).running() is None
    assert not [p for p in below if alive(p.pid)]


@pytest.mark.stack
def test_a_port_that_is_taken_is_named(short_dir: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = patchwork(short_dir, "up", "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
