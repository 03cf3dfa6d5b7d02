"""The base of every model a user or another process sends us."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and non-finite numbers: input is validated at the door, then frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Stored(BaseModel):
    """A frozen model read back from disk or another process: unknown keys are ignored, so that an older reader
    survives a newer writer. Writers still produce exactly these fields."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A name shown to people. Never a part of a path or a key."""

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""A name that may become a part of a path or a key."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
