"""Settings of the control plane: what an error must not say."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestrator.settings import Settings


def test_several_processes_do_not_serve_the_dashboard() -> None:
    assert Settings(processes=4, dashboard=False).processes == 4
    with pytest.raises(ValidationError) as caught:
        Settings(processes=4)
    text = str(caught.value)
    for part in ("processes 4", "dashboard true", "only 1 is allowed", "Set dashboard to false", "another port"):
        assert part in text
    with pytest.raises(ValidationError, match="processes"):
        Settings(processes=0, dashboard=False)


def test_an_error_names_the_setting_and_not_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHWORK_PORT", "hunter2")
    with pytest.raises(ValidationError) as caught:
        Settings(s3_secret_key=["topsecret"])
    text = str(caught.value)
    assert "port" in text
    assert "s3_secret_key" in text
    assert "hunter2" not in text
    assert "topsecret" not in text
