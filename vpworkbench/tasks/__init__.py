"""Downstream tasks (paper Sec. 4.2). A new task is one file and one line here: see docs/new_task.md."""

from vpworkbench.tasks.nlvr import NLVR1, NLVR2
from vpworkbench.tasks.retrieval import RETRIEVAL
from vpworkbench.tasks.snli_ve import SNLI_VE
from vpworkbench.tasks.task import Task
from vpworkbench.tasks.vqa import VQA

TASKS: dict[str, Task] = {task.name: task for task in (VQA, NLVR2, NLVR1, SNLI_VE, RETRIEVAL)}
"""All tasks, by the value of the setting `task`."""
