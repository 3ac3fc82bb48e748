"""vpworkbench: a research workbench for visual parsing in vision-language pre-training.

`import vpworkbench as vpw` costs nothing; each name is imported from its module when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PLACES = {
    # models
    "load": "subjects:load",
    "predict": "subjects:predict",
    "explore": "explorer:explore",
    # probes
    "probe": "probing:probe",
    "inter_modality_flow": "probes:inter_modality_flow",
    "flow_from_attention": "probes:flow_from_attention",
    "modality_masks": "probes:modality_masks",
    "modality_nmi": "probes:modality_nmi",
    "check": "probes:check",
    "knock_out": "probes:knock_out",
    "probe_answer": "answers:probe_answer",
    "patch": "probes:patch",
    "patch_inputs": "studies.patching:patch_inputs",
    "readouts": "probes.readouts",
    "lens": "probes:lens",
    "write_captions": "model.readouts:write_captions",
    "find_sinks": "probes:find_sinks",
    # data and figures
    "held_out": "data.splits:load_held_out",
    "minimal_pairs": "data.minimal_pairs:load_pairs",
    "figures": "figures",
    # runs
    "open_run": "runs:open_run",
    "find_runs": "jobs.results:find_runs",
    "run_notebook": "jobs.notebooks:run_notebook",
    "sweep": "jobs.sweep:sweep_notebook",
    # settings
    "preset": "settings:preset",
    "pretrain_settings": "settings:pretrain_settings",
    "finetune_settings": "tasks.settings:finetune_settings",
    "visual_init_settings": "settings:visual_init_settings",
    "PretrainSettings": "settings:PretrainSettings",
    "FinetuneSettings": "settings:FinetuneSettings",
    "VisualInitSettings": "settings:VisualInitSettings",
    "DataSettings": "settings:DataSettings",
    "SceneSettings": "settings:SceneSettings",
    "PairSettings": "settings:PairSettings",
    "ProbeSettings": "settings:ProbeSettings",
    "CompareSettings": "settings:CompareSettings",
    "ExploreSettings": "settings:ExploreSettings",
    "RunsSettings": "settings:RunsSettings",
    "FamilyRunsSettings": "settings:FamilyRunsSettings",
    "StudySettings": "settings:StudySettings",
}
"""Public name -> module, or module:name."""

__all__ = list(PLACES)


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PLACES[name].partition(":")
    found = import_module(f"{__name__}.{module}")
    globals()[name] = getattr(found, attribute) if attribute else found
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
