"""Learners for Hugging Face PEFT. Importing this package registers its tuners with PEFT.

from peft import get_peft_model
from peft_learners import LearnerConfig, PhaseCallback
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__

# Tables show the methods in this order.
# isort: off
from .learner import LearnerConfig, LearnerModel
from .far import FARConfig, FARModel
from .nas_lora import Architecture, NASLoRAConfig, NASLoRAModel
from .bottleneck import BottleneckConfig, BottleneckModel

# isort: on
from .phases.driver import PhaseDriver, PhaseStart
from .phases.schedule import Phase, Schedule, ScheduleError

if TYPE_CHECKING:
    from .phases.callback import PhaseCallback
    from .phases.lr_schedule import get_phased_scheduler

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


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Trainer's modules take a while to import, and merging or serving an adapter needs none of them.
    if name == "PhaseCallback":
        from .phases.callback import PhaseCallback

        return PhaseCallback
    if name == "get_phased_scheduler":
        from .phases.lr_schedule import get_phased_scheduler

        return get_phased_scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
