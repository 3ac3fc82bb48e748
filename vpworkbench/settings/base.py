"""Settings in general: typed, frozen, checked as a whole; every fault on a line of its own."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from vpworkbench.errors import SettingsError


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, wrong types refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    def with_overrides(self, overrides: dict[str, Any]) -> Self:
        """A copy with some values replaced; keys are dotted paths, e.g. `{"mask.budget": 14}`.

        Raises
        ------
        SettingsError
            For an unknown path (the nearest valid one is named) or a value of the wrong type or range.
        """
        valid = dict(_leaves(self))
        values = self.model_dump()
        if faults := [f"{path}: no such setting{nearest(path, valid)}" for path in overrides if path not in valid]:
            raise SettingsError("\n".join(faults))
        for path, value in (valid | overrides).items():  # all: a dump leaves some out at their defaults
            *parents, leaf = path.split(".")
            node = values
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return checked(type(self), values)


S = TypeVar("S", bound=Settings)


def checked(kind: type[S], values: dict[str, Any]) -> S:
    """Build settings; all faults at once, one line each, as a `SettingsError`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(fault_lines(error, _leaf_names(kind))) from None


def fault_lines(error: ValidationError, valid: Iterable[str] = ()) -> str:
    """One line for each fault of a pydantic error: where, what, what was given, the nearest valid name."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "settings"
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{path}: no such setting{nearest(path, valid)}")
        elif fault["type"] == "value_error":
            lines.append(f"{path}: {fault['ctx']['error']}")
        else:
            lines.append(f"{path}: {fault['msg']} (given: {fault['input']!r:.60})")
    return "\n".join(lines)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that comes nearest, to be put behind an error; empty where none does."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _leaves(settings: Settings, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _leaf_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _leaf_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def anchored(value: Any) -> Any:
    """A relative path that exists, made absolute; a bare word is left alone: `scenes` is a set even beside a folder.

    So a run is found again from any folder, and has one hash however it was started.
    """
    if isinstance(value, (list, tuple)):
        return [anchored(item) for item in value]
    if isinstance(value, str) and re.search(r"[/\\]", value) and os.path.exists(os.path.expanduser(value)):
        return os.path.abspath(os.path.expanduser(value))
    return value


def one_or_many(value: Any) -> Any:
    return anchored((value,) if isinstance(value, str) else value)


def located(value: Any) -> Any:
    """As `anchored`, bare words too: for what can be nothing but a path."""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and os.path.exists(value) else value


Place = Annotated[str, BeforeValidator(anchored)]
"""A path, or a word that stands for something installed or shipped."""
Location = Annotated[str, BeforeValidator(located), BeforeValidator(anchored)]
"""A path."""
