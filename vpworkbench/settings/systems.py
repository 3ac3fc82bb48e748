"""Systems of the paper's tables as values: what their fusion and objectives change in the settings of pre-training.

Each takes any visual side; all of them were made for `regions`. docs/systems.md says what is as in their papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLASSES_FOR_FEATURES = {"mask.mode": "random", "loss.mrc": 1.0, "loss.mfr": 0.0, "loss.vla": 0.0}
_MATCHED_ONLY = {"loss.itm": 0.0, "data.matched_per_image": 4, "data.unmatched_per_image": 0}  # as many texts as others
_WRITES = {"loss.seq2seq": 0.75, "data.mask_end": True}

SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "vilbert": {"fusion.kind": "two-stream", **_CLASSES_FOR_FEATURES},  # Lu et al. 2019
    "vl-bert": {"fusion.whole_image": True, **_CLASSES_FOR_FEATURES, **_MATCHED_ONLY},  # Su et al. 2020
    "unicoder-vl": _CLASSES_FOR_FEATURES,  # Li et al. 2020
    "unified-vlp": {"mask.mode": "none", **_WRITES, **_MATCHED_ONLY},  # Zhou et al. 2020
}
"""Value of `system` of `01_pretrain` -> overrides."""
