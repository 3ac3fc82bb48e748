"""The exceptions that callers catch; each message names the file or setting, the fault and the remedy."""

from __future__ import annotations


class SettingsError(ValueError):
    """Settings that cannot be used: one line for each fault."""


class DataError(ValueError):
    """Data that cannot be used."""


class ImageMissing(DataError):
    """An image that is missing or cannot be read; the rest of its record may be sound."""


class RegionsMissing(DataError):
    """An image without region features; the rest of its record may be sound."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded."""


class RunError(RuntimeError):
    """A run that failed, or a run folder that cannot be used."""


class TrainingError(RunError):
    """Training that cannot continue; the message names the step."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type without a message; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
