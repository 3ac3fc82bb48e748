"""Every plot of the workbench, as a plain plotly figure.

Functions take arrays (numpy, CPU tensors, DataFrames) and return one `go.Figure`; no model, no file inside.
Layers count from 0 in arrays and from 1 on axes; shares lie in [0, 1] in arrays and are percent on axes.
`figure.layout.meta["alt"]` says in one sentence, in plain text, what is seen.
"""

from vpworkbench.figures.answers import answers, answers_page
from vpworkbench.figures.pictures import attention_on_image, masks, parsing, pictures, regions, tokens
from vpworkbench.figures.probes import (
    flow_curves,
    flow_directions,
    flow_triangle,
    modality_map,
    nmi,
    score_against_flow,
    word_attention,
)
from vpworkbench.figures.style import ExportError, export, to_image
from vpworkbench.figures.training import accuracy_bars, held_out, losses, recall_bars, run_curves, task_scores

__all__ = [
    "ExportError",
    "accuracy_bars",
    "answers",
    "answers_page",
    "attention_on_image",
    "flow_curves",
    "flow_directions",
    "flow_triangle",
    "held_out",
    "losses",
    "masks",
    "modality_map",
    "nmi",
    "parsing",
    "pictures",
    "recall_bars",
    "regions",
    "run_curves",
    "score_against_flow",
    "task_scores",
    "export",
    "to_image",
    "tokens",
    "word_attention",
]
