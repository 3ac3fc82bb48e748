"""True or false of photographs or drawings: NLVR2 (paper Table 2), and NLVR v1 as a stand-in for it.

NLVR2's photographs must be fetched one by one; the drawings of NLVR v1 need no fetching.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vpworkbench.data import task_readers
from vpworkbench.data.records import Example
from vpworkbench.metrics import NLVR2_IDENTIFIER, consistency
from vpworkbench.settings import OptimSettings, TrainSettings
from vpworkbench.tasks.classification import accuracies, fixed_labels
from vpworkbench.tasks.task import TINY, Task

PAPER = {
    "optim": OptimSettings(decay_at=tuple(epoch / 80 for epoch in (60, 65, 70, 75, 78, 79)), decay=0.5),
    "train": TrainSettings(epochs=80, images=512, accumulate=64),
}


def statements_and_subsets(examples: Sequence[Example], predicted: Mapping[str, str]) -> dict[str, float]:
    """Consistency over released identifiers, which say which examples share a statement; custom tables have none.

    Also the accuracy on each of the release's subsets, if they were asked for (see `read_nlvr2`).
    """
    released = (one for one in examples if one.label and re.search(NLVR2_IDENTIFIER, one.id))
    labels = {example.id: example.label for example in released}
    scores = {"consistency": consistency(predicted, labels)} if labels else {}
    for kind in sorted({example.kind for example in examples} - {""}):
        some = [example for example in examples if example.kind == kind and example.label]
        scores |= {f"accuracy_{kind}": float(accuracies(some, predicted).mean())} if some else {}
    return scores


NLVR2 = Task(
    name="nlvr2",
    read=lambda path, settings: task_readers.read_nlvr2(path, images=settings.images, subsets=settings.subsets),
    images=2,
    labels=fixed_labels("False", "True"),
    more_scores=statements_and_subsets,
    schedules={"tiny": TINY, "paper": PAPER},
    own_settings=("pairing", "subsets", "mac_steps"),
)

NLVR1 = Task(
    name="nlvr1",
    read=lambda path, settings: task_readers.NLVR1_TASK.read(path, settings.images),
    labels=fixed_labels("False", "True"),
    schedules={"tiny": TINY, "paper": PAPER},
    own_settings=("mac_steps",),
)
