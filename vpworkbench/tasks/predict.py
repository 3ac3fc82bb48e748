"""Fine-tuned models: load one from its folder, and predict a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file

from vpworkbench.data.captioned import TABLE
from vpworkbench.data.files import faults_at
from vpworkbench.data.images import ImageFile
from vpworkbench.data.readers import open_annotations, unique
from vpworkbench.data.tables import read_unsplit_rows
from vpworkbench.errors import CheckpointError, DataError
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.published import without_nan
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel


def load_task_model(folder: str | Path) -> TaskModel:
    """A model that `TaskModel.save_pretrained` wrote, in evaluation mode; a `CheckpointError` if it is not whole."""
    folder = Path(folder)
    try:
        content = json.loads((folder / "task.json").read_text())
        base = VisualParsingModel.from_config(folder)
        kind = {name: content[name] for name in ("pairing", "pool")}
        model = TaskModel(base, TASKS[content["task"]], content["label2ans"], **kind)
        file = folder / "model.safetensors"
        model.load_state_dict(without_nan(load_file(file), file))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: no whole fine-tuned model ({error}); give a run of 04_finetune") from None
    return model.eval()


def predict_table(model: TaskModel, table: str | Path, *, images: Sequence[str | Path] = ()) -> pd.DataFrame:
    """The most likely label for each row of a csv or json lines of `image`, `text` and, for NLVR2, `image2`.

    `images` are folders and zips of the images; empty: beside the table. The result has the columns `id`, `image`,
    `text`, `prediction` and `probability`, in the order of the table.

    Before anything is predicted, a `DataError` for a broken row, an image that is missing or cannot be read, or a wrong
    number of images.
    """
    opened = open_annotations(table, [TABLE], images)
    rows = unique(read_unsplit_rows(opened), opened.file)
    decoded: set[ImageFile] = set()
    for row in rows:
        with faults_at(row.where):
            if len(row.images) != model.task.images:
                wanted = "leave image2 empty" if model.task.images == 1 else "fill image and image2"
                raise DataError(f"{len(row.images)} images, but {model.task.name} takes {model.task.images}: {wanted}")
            for image in set(row.images) - decoded:
                image.pixels()
            decoded.update(row.images)
    predicted = model.predict_all([row.images for row in rows], [row.text for row in rows])
    lines = []
    for row, probabilities in zip(rows, predicted, strict=True):
        label, probability = next(iter(probabilities.items()))
        lines.append((row.id, " ".join(image.name for image in row.images), row.text, label, round(probability, 4)))
    return pd.DataFrame(lines, columns=["id", "image", "text", "prediction", "probability"])
