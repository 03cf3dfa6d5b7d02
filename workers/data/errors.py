"""Errors of the data path.

DataError            the data set cannot be used: missing, damaged, too many unreadable images. Ends the attempt.
UnreadableImage      one image cannot be used. The loader counts it and takes another in its place.
"""

from __future__ import annotations


class DataError(Exception):
    """The data cannot be used. The message says what is wrong, where it was looked for, and what to do next."""


class UnreadableImage(Exception):
    """One image is missing, truncated, not an image, or too large. The message says which of these."""
