"""Learners (arXiv 2208.02070): low-rank modules on every linear layer, with priming of the attention."""

from ..registry import ensure_peft_type, register

ensure_peft_type("LEARNER")  # before the config, which sets it

from .config import LearnerConfig  # noqa: E402
from .layer import LearnerLayer, LearnerLinear, LearnerNorm  # noqa: E402
from .model import LearnerModel  # noqa: E402

__all__ = ["LearnerConfig", "LearnerLayer", "LearnerLinear", "LearnerModel", "LearnerNorm"]

register(name="learner", config_cls=LearnerConfig, model_cls=LearnerModel)
