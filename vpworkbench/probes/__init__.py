"""Probes of how vision and language fuse, for our model and for any transformers model."""

from vpworkbench.probes.flow import Check, InterModalityFlow, check, inter_modality_flow
from vpworkbench.probes.formula import crossing_share, flow_from_attention
from vpworkbench.probes.hidden import hidden_states
from vpworkbench.probes.layouts import ModalityMasks, modality_masks
from vpworkbench.probes.masks import MaskComparison, compare_masks, mask_on_object, object_tokens, random_on_object
from vpworkbench.probes.nmi import Clusters, Picture, cluster_tokens, modality_nmi, modality_pca
from vpworkbench.stats import Interval, bootstrap_interval

__all__ = [
    "Check",
    "Clusters",
    "InterModalityFlow",
    "Interval",
    "MaskComparison",
    "ModalityMasks",
    "Picture",
    "bootstrap_interval",
    "check",
    "cluster_tokens",
    "compare_masks",
    "crossing_share",
    "flow_from_attention",
    "hidden_states",
    "inter_modality_flow",
    "mask_on_object",
    "modality_masks",
    "modality_nmi",
    "modality_pca",
    "object_tokens",
    "random_on_object",
]
