"""Settings of a Ray node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.node import load_node_settings


@pytest.mark.parametrize("value", [8412734, ["8412734"], {"key": "8412734"}])
def test_a_secret_of_the_wrong_type_is_not_repeated_in_the_error(
    value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver writes this error to its log."""
    file = tmp_path / "node.json"
    file.write_text(json.dumps({"s3_secret_key": value}))
    monkeypatch.delenv("PATCHWORK_S3_SECRET_KEY", raising=False)
    monkeypatch.setenv("PATCHWORK_NODE_FILE", str(file))
    with pytest.raises(ValueError, match="s3_secret_key") as caught:
        load_node_settings()
    assert "8412734" not in str(caught.value)
