"""Visual entailment, SNLI-VE (paper Table 3): does the image entail the hypothesis, contradict it, or neither?"""

from __future__ import annotations

from vpworkbench.data.task_readers import ENTAILMENT, read_snli_ve
from vpworkbench.settings import OptimSettings, TrainSettings
from vpworkbench.tasks.classification import fixed_labels
from vpworkbench.tasks.task import TINY, Task

SNLI_VE = Task(
    name="snli-ve",
    read=lambda path, settings: read_snli_ve(path, images=settings.images, premise=settings.premise),
    labels=fixed_labels(*ENTAILMENT),
    schedules={
        "tiny": TINY,
        "paper": {
            "optim": OptimSettings(lr_visual=5e-5, decay_at=(15 / 25, 20 / 25, 23 / 25)),
            "train": TrainSettings(epochs=25, images=512, accumulate=64),
        },
    },
    own_settings=("premise",),
)
