"""The model (paper Fig. 1): visual side, fusion Transformer and heads; starts from trained weights; what it costs."""

from vpworkbench.model.model import Inputs, Joint, VisualParsingModel
from vpworkbench.model.readouts import fill_mask, match_probability
from vpworkbench.model.visual import VisualTokens, build_visual
from vpworkbench.model.words import Words, build_tokenizer
