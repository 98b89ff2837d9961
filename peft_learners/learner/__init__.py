"""Learners (arXiv 2208.02070): low-rank modules on every linear layer, with priming of the attention."""

from ..registry import register
from .config import LearnerConfig
from .layer import LearnerLayer, LearnerLinear, LearnerNorm
from .model import LearnerModel

__all__ = ["LearnerConfig", "LearnerLayer", "LearnerLinear", "LearnerModel", "LearnerNorm"]

register(LearnerConfig, LearnerModel)
