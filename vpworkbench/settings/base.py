"""What all settings share: typed, frozen, checked as a whole; all faults are reported at once."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from vpworkbench.errors import SettingsError


class Settings(BaseModel):
    """Base of all settings: frozen; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def with_overrides(self, overrides: dict[str, Any]) -> Self:
        """A copy with some values replaced; keys are dotted paths, e.g. `{"mask.budget": 14}`.

        A `SettingsError` for an unknown path (the nearest valid one is named) or a value of the wrong type or range.
        """
        current = {path: attrgetter(path)(self) for path in setting_paths(type(self))}
        if faults := [f"{path}: no such setting{nearest(path, current)}" for path in overrides if path not in current]:
            raise SettingsError("\n".join(faults))
        values: dict[str, Any] = {}
        for path, value in (current | overrides).items():
            *parents, leaf = path.split(".")
            node = values
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return checked(type(self), values)


S = TypeVar("S", bound=BaseModel)


def checked(kind: type[S], values: dict[str, Any]) -> S:
    """Build settings; a `SettingsError` lists all faults, one on each line."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(fault_lines(error, [*setting_paths(kind), *_listed_paths(kind)])) from None


def fault_lines(error: ValidationError, valid: Iterable[str] = ()) -> str:
    """One line for each fault that pydantic found; an unknown setting gets the nearest valid name."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "settings"
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{path}: no such setting{nearest(re.sub(r'[.][0-9]+', '', path), valid)}")
        elif fault["type"] == "value_error":  # raised by a validator of ours, which shows the value itself
            lines.append(f"{path}: {fault['ctx']['error']}")
        else:
            lines.append(f"{path}: {fault['msg']} (given: {fault['input']!r:.60})")
    return "\n".join(lines)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message that suggests the most similar valid name; empty if none is similar."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def known(name: str, names: Collection[str], what: str) -> str:
    """The name, if it is one of `names`; else a `SettingsError` that begins with `what`."""
    if name not in names:
        raise SettingsError(f"{what} {name!r}{nearest(name, names)} (known: {', '.join(names)})")
    return name


def setting_paths(kind: type[BaseModel]) -> list[str]:
    """The dotted path of every setting in a class and its nested classes."""
    paths: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += [f"{name}.{path}" for path in setting_paths(field.annotation)]
        else:
            paths.append(name)
    return paths


def _listed_paths(kind: type[BaseModel]) -> list[str]:
    """The dotted paths of settings in lists, without the places in these."""
    parts = [(name, part) for name, field in kind.model_fields.items() for part in get_args(field.annotation)]
    models = [(name, part) for name, part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return [f"{name}.{path}" for name, part in models for path in setting_paths(part)]


def absolute_path(value: Any) -> Any:
    """Make an existing path absolute, so that a run keeps its hash and is found again from any folder."""
    path = os.path.expanduser(value) if isinstance(value, str) else ""
    return os.path.abspath(path) if os.path.exists(path) else value


LocalPath = Annotated[str, BeforeValidator(absolute_path)]
"""A path."""
PathOrName = Annotated[
    str, BeforeValidator(lambda value: absolute_path(value) if re.search(r"[/\\]", str(value)) else value)
]
"""A path, or the name of something shipped, installed or cached: `scenes` is a set even beside a folder `scenes`."""
_LISTED = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
PathsOrNames = Annotated[tuple[PathOrName, ...], _LISTED]
"""Several of them; a single one may be given without a list."""


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError(f"{value!r} names nothing; give 'scenes', or the folder or file of a set")
    return value


SetName = Annotated[PathOrName, AfterValidator(_named)]
"""A set. It must have a name: an empty path would be the current folder."""
SetNames = Annotated[tuple[SetName, ...], _LISTED]
"""Several sets; a single one may be given without a list."""
