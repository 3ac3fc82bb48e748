"""Every plot of the workbench, as a plain plotly figure.

Functions take arrays (numpy, CPU tensors, DataFrames) and return one `go.Figure`; no model, no file inside.
Layers count from 0 in arrays and from 1 on axes; shares lie in [0, 1] in arrays and are percent on axes.
`figure.layout.meta["alt"]` describes the figure in one sentence of plain text.
"""

from vpworkbench.figures.answers import Reviewed, answers, answers_page
from vpworkbench.figures.pictures import attention_on_image, masks, parsing, pictures, regions, tokens
from vpworkbench.figures.probes import (
    flow_curves,
    flow_directions,
    flow_triangle,
    layer_curves,
    layer_maps,
    modality_map,
    nmi,
    score_against_flow,
)
from vpworkbench.figures.style import export
from vpworkbench.figures.training import (
    accuracy_bars,
    forest,
    grouped_bars,
    held_out,
    losses,
    run_curves,
    scores_against,
    task_scores,
)
