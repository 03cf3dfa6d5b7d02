"""Metrics on their way to other tools."""
