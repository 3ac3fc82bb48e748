"""The examples of a task, split so that no image of validation or test is trained on."""

from __future__ import annotations

from typing import NamedTuple

from vpworkbench.data.records import Picture
from vpworkbench.data.splits import without_leaks
from vpworkbench.data.task_readers import ANY_TABLE, Splits, TaskFiles
from vpworkbench.errors import DataError
from vpworkbench.settings import FinetuneSettings

TABLES = TaskFiles(ANY_TABLE, names=(), truth=lambda label: {"label": label})
"""Custom tables, with any labels."""


class TaskExamples(NamedTuple):
    """The examples of a task; captioned pictures for retrieval.

    Attributes
    ----------
    splits : dict
        `train`, `val` and `test`; training leaves out examples whose image is in another split.
    shared : frozenset of str
        Ids of test examples whose image the release also has in training or validation.
    """

    splits: Splits | dict[str, list[Picture]]
    shared: frozenset[str] = frozenset()


def keep_apart(splits: Splits, settings: FinetuneSettings) -> TaskExamples:
    """Leave out training examples whose image is in validation or test, and find the test images that are shared.

    Raises
    ------
    DataError
        If training or validation has no examples.
    """
    for split in ("train", "val"):
        if not splits[split]:
            raise DataError(f"{settings.data}: no examples of {settings.task} in {split}; it needs some")
    held_out = [*splits["val"], *splits["test"]]
    kept, marks = without_leaks(splits["train"], held_out, "training examples are about images of val or test")
    if not kept:
        raise DataError(f"{settings.data}: every image of train is in val or test too; split by image")
    elsewhere = {marks[image] for split in ("train", "val") for example in splits[split] for image in example.images}
    shared = {example.id for example in splits["test"] if any(marks[image] in elsewhere for image in example.images)}
    return TaskExamples(splits | {"train": kept}, frozenset(shared))
