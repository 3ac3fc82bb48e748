"""vpworkbench: a research workbench for visual parsing in vision-language pre-training."""

from __future__ import annotations

__version__ = "0.1.0"
