"""Probes of how vision and language fuse, for our model and for any transformers model."""

from vpworkbench.probes.exactness import Check, check
from vpworkbench.probes.flow import InterModalityFlow, inter_modality_flow
from vpworkbench.probes.formula import crossing_share, flow_from_attention
from vpworkbench.probes.layers import hidden_states
from vpworkbench.probes.layouts import ModalityMasks, modality_masks
from vpworkbench.probes.masks import (
    BudgetShares,
    ObjectShares,
    largest_on_object,
    mask_on_object,
    objects_of_boxes,
    objects_of_tokens,
    random_on_object,
    shares_at_budget,
    shares_on_objects,
)
from vpworkbench.probes.nmi import Clusters, PrincipalComponents, cluster_tokens, modality_nmi, modality_pca

__all__ = [
    "BudgetShares",
    "Check",
    "Clusters",
    "InterModalityFlow",
    "ModalityMasks",
    "ObjectShares",
    "PrincipalComponents",
    "check",
    "cluster_tokens",
    "crossing_share",
    "flow_from_attention",
    "hidden_states",
    "inter_modality_flow",
    "largest_on_object",
    "mask_on_object",
    "modality_masks",
    "modality_nmi",
    "modality_pca",
    "objects_of_boxes",
    "objects_of_tokens",
    "random_on_object",
    "shares_at_budget",
    "shares_on_objects",
]
