"""Learners for Hugging Face PEFT. Importing this package registers its tuners with PEFT.

from peft import get_peft_model
from peft_learners import LearnerConfig, PhaseCallback
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .bottleneck import BottleneckConfig, BottleneckModel
from .far import FARConfig, FARModel
from .learner import LearnerConfig, LearnerModel
from .nas_lora import Architecture, NASLoRAConfig, NASLoRAModel
from .phases import PhaseDriver, PhaseStart
from .schedule import Phase, Schedule, ScheduleError

if TYPE_CHECKING:
    from .callback import PhaseCallback
    from .lr_schedule import get_phased_scheduler

__all__ = [
    "Architecture",
    "BottleneckConfig",
    "BottleneckModel",
    "FARConfig",
    "FARModel",
    "LearnerConfig",
    "LearnerModel",
    "NASLoRAConfig",
    "NASLoRAModel",
    "Phase",
    "PhaseCallback",
    "PhaseDriver",
    "PhaseStart",
    "Schedule",
    "ScheduleError",
    "__version__",
    "get_phased_scheduler",
]


def __getattr__(name: str) -> Any:
    # Trainer's modules take a while to import, and merging or serving an adapter needs none of them.
    if name == "PhaseCallback":
        from .callback import PhaseCallback

        return PhaseCallback
    if name == "get_phased_scheduler":
        from .lr_schedule import get_phased_scheduler

        return get_phased_scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
