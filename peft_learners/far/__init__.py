"""FAR, Freeze And Reconfigure (arXiv 2205.01541): after a short priming only the FFN nodes that moved most train."""

from ..registry import ensure_peft_type, register

ensure_peft_type("FAR")  # before the config, which sets it

from .base import FARLayer  # noqa: E402
from .config import FARConfig  # noqa: E402
from .layer import FAREmbedding, FARLinear, FARModule  # noqa: E402
from .model import FARModel  # noqa: E402

__all__ = ["FARConfig", "FAREmbedding", "FARLayer", "FARLinear", "FARModel", "FARModule"]

register(name="far", config_cls=FARConfig, model_cls=FARModel)
