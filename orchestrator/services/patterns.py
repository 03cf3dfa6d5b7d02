"""Searching text with a regular expression that a user wrote.

Python's own engine may take longer than the universe lasts for a pattern of twenty characters, and holds the
interpreter's lock meanwhile. So it runs in a process of its own, which is ended when its time is up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from orchestrator.services.problems import Invalid, field_error

MAX_PATTERN = 256
TIMEOUT_S = 5.0
_PROGRAM = """
import json, re, sys
pattern, texts = json.load(sys.stdin)
found = re.compile(pattern, re.IGNORECASE).search
json.dump([found(text) is not None for text in texts], sys.stdout)
"""


def check_pattern(pattern: str, pointer: str = "/regex") -> None:
    """Raises Invalid: it is no regular expression of Python, or too long."""
    message = None
    if len(pattern) > MAX_PATTERN:
        message = f"is longer than {MAX_PATTERN} characters"
    else:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            message = f"is not a regular expression: {error}"
    if message is not None:
        errors = [field_error(pointer, message, pattern, "a regular expression, such as loss: [0-9.]+")]
        raise Invalid(f"The pattern {message}.", errors=errors)


def matches(pattern: str, texts: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[bool]:
    """For each of `texts` whether the pattern is found in it, in any case.

    Raises:
        Invalid: it took longer than `timeout_s` seconds.
    """
    if not texts:
        return []
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([pattern, list(texts)]).encode(),
            capture_output=True,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.TimeoutExpired:
        message = f"takes longer than {timeout_s:g} s to search with"
        errors = [field_error("/regex", message, pattern, "a pattern without repeats inside of repeats")]
        raise Invalid(f"The pattern {message}.", errors=errors) from None
    found: list[bool] = json.loads(done.stdout)
    return found
