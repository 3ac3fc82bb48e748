"""True or false of one drawing, NLVR v1: a stand-in for NLVR2, whose photographs must be fetched one by one."""

from __future__ import annotations

from vpworkbench.data.task_readers import read_nlvr1
from vpworkbench.tasks.classification import fixed_labels
from vpworkbench.tasks.nlvr2 import PAPER
from vpworkbench.tasks.task import TINY, Task

NLVR1 = Task(
    name="nlvr1",
    read=lambda path, settings: read_nlvr1(path, images=settings.images),
    labels=fixed_labels("False", "True"),
    schedules={"tiny": TINY, "paper": PAPER},
)
