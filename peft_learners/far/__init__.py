"""FAR, Freeze And Reconfigure (arXiv 2205.01541): after a short priming only the FFN nodes that moved most train."""

from ..registry import register
from .config import FARConfig
from .layer import FAREmbedding, FARLayer, FARLinear, FARModule
from .model import FARModel

__all__ = ["FARConfig", "FAREmbedding", "FARLayer", "FARLinear", "FARModel", "FARModule"]

register(FARConfig, FARModel)
