"""The exceptions that callers catch; each message names the file or the setting, and the remedy."""

from __future__ import annotations


class SettingsError(ValueError):
    """Settings that cannot be used: every fault on a line of its own, each with its remedy."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record and the remedy."""


class RegionsMissing(DataError):
    """An image without features; everything else about it may be right."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the remedy."""


class RunError(RuntimeError):
    """A run that failed, or a run folder that cannot be used."""


class TrainingError(RunError):
    """Training that cannot go on; the message says at which step and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
