"""Jobs that fail, on the real stack: the user sees the cause, the last lines of the rank that failed first, and advice,
by the API, by `patchwork show` and while following."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.cli.main import run
from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from tests.stack.jobs import pretraining

pytestmark = pytest.mark.stack
CIFAR = {"type": "torchvision", "name": "CIFAR10", "download": "never"}


@pytest.mark.parametrize(
    ("reason", "overrides", "message", "last_line", "advice"),
    [
        # Pixels divided by next to nothing are infinite.
        ("NAN_LOSS", {"data__std": [1e-42]}, "not finite for 3 steps", "NAN_LOSS", "optim.lr"),
        (
            "DATA_ERROR",
            {"data__source": CIFAR, "model__in_channels": 3},
            "CIFAR10",
            "CIFAR10 was not found",
            "data set",
        ),
    ],
)
def test_a_failure_tells_its_cause_and_what_to_do(
    stack: Stack,
    client: Client,
    capsys: pytest.CaptureFixture[str],
    reason: str,
    overrides: dict[str, Any],
    message: str,
    last_line: str,
    advice: str,
) -> None:
    made = client.jobs.create(pretraining(name=reason.lower(), **overrides))
    server = ("--url", stack.url, "--token", stack.token)
    assert run(["show", made.id, "--follow", *server]) == 1
    followed = capsys.readouterr().out
    assert run(["show", made.id, *server]) == 0
    shown = capsys.readouterr().out

    job = client.jobs.get(made.id)
    assert (job.state, job.reason, job.num_attempts) == ("FAILED", reason, 1)
    assert message in job.message
    assert job.advice is not None
    assert advice in job.advice
    first = job.attempts[0].first_failure
    assert first is not None
    said = "\n".join(first.last_lines)
    assert last_line in said, said
    for text in (followed, shown):
        assert reason in text
        assert message in text
        assert f"rank {first.rank} on {first.node} first" in text
        assert first.last_lines[-1][:60] in text
        assert job.advice in text
    assert run(["show", made.id, "--json", *server]) == 0
    assert json.loads(capsys.readouterr().out)["attempts"][0]["first_failure"]["last_lines"] == list(first.last_lines)
