"""Probes of how vision and language fuse, for our model and for any transformers model."""

from vpworkbench.probes.exactness import Check, check
from vpworkbench.probes.flow import InterModalityFlow, inter_modality_flow
from vpworkbench.probes.formula import crossing_share, flow_from_attention
from vpworkbench.probes.knock_out import KnockOut, attention_blocked, knock_out
from vpworkbench.probes.layers import hidden_states
from vpworkbench.probes.layouts import ModalityMasks, modality_masks
from vpworkbench.probes.lens import lens, words_by_layer
from vpworkbench.probes.masks import mask_on_object, objects_of_boxes, objects_of_tokens, shares_on_objects
from vpworkbench.probes.nmi import cluster_tokens, modality_nmi, modality_pca
from vpworkbench.probes.patching import Patched, each_token, patch
from vpworkbench.probes.sinks import Sinks, find_sinks
