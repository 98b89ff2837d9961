"""Learners for Hugging Face PEFT. Importing this package registers its tuners with PEFT.

from peft import get_peft_model
from peft_learners import LearnerConfig, PhaseCallback
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .far import FARConfig, FARModel
from .learner import LearnerConfig, LearnerModel
from .phases import PhaseDriver, PhaseStart
from .schedule import Phase, Schedule, ScheduleError

if TYPE_CHECKING:
    from .callback import PhaseCallback

__all__ = [
    "FARConfig",
    "FARModel",
    "LearnerConfig",
    "LearnerModel",
    "Phase",
    "PhaseCallback",
    "PhaseDriver",
    "PhaseStart",
    "Schedule",
    "ScheduleError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Trainer's modules take a while to import, and merging or serving an adapter needs none of them.
    if name == "PhaseCallback":
        from .callback import PhaseCallback

        return PhaseCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
