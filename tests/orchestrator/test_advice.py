"""What a user is told of each reason."""

from __future__ import annotations

import re

import pytest

from configs.reasons import EXIT_REASONS, ExitReason
from orchestrator.cli.main import app
from tests.configs.specs import FINETUNE, job

COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
FIELD = re.compile(r"(?<![\w.])([a-z_]+)\.([a-z_]+)")


def test_every_reason_has_a_row() -> None:
    assert set(EXIT_REASONS) == set(ExitReason)


@pytest.mark.parametrize("reason", list(ExitReason))
def test_advice_says_what_to_do_with_what_there_is(reason: ExitReason) -> None:
    advice = EXIT_REASONS[reason].advice
    commands = re.findall(r"`patchwork ([a-z-]+)", advice)
    assert set(commands) <= COMMANDS
    spec = job(FINETUNE).model_dump(mode="json")
    fields = FIELD.findall(advice)
    assert all(field in spec[section] for section, field in fields), fields
    if EXIT_REASONS[reason].retry in ("user", "infra") and reason is not ExitReason.FENCED:
        assert commands or fields or "report it" in advice, "nothing that one could do"
