"""How a step's time grows: rows for one axis after the other, on a BERT of two blocks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from peft_learners import LearnerConfig
from scripts.bench.measure import Variant
from scripts.bench.methods import METHODS, Build, adapted, linear_layers, trains
from scripts.bench.settings import Setting, Workload, prepare, small_bert

WIDTH, RANK, BATCH, TOKENS, ROUNDS = 384, 64, 32, 32, 12
#: Of each of several adapters.
RANK_OF_SEVERAL = 16
#: The values of each axis; the others stay as above. `tokens` are those of a step.
AXES: dict[str, tuple[int, ...]] = {
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "tokens": (64, 128, 256, 512, 1024, 2048, 4096),
    "width": (128, 256, 512, 1024),
    "adapters": (1, 2, 4, 8),
    "active_adapters": (1, 2, 4, 8),
}


@dataclass(frozen=True)
class Point:
    """One value of one axis, and what is measured there."""

    axis: str
    value: int
    setting: Setting
    methods: dict[str, Build]


def points(
    axes: Mapping[str, Sequence[int]], rounds: int = ROUNDS, width: int = WIDTH, name: str = "scaling"
) -> Iterator[Point]:
    """All points, axis by axis.

    Args:
        width: of the model, where that is not the axis.
        name: of the setting.
    """
    for axis, values in axes.items():
        for value in values:
            at = {"rank": RANK, "tokens": BATCH * TOKENS, "width": width, **{axis: value}}
            config = partial(small_bert, at["width"])
            setting = Setting(name, TOKENS, at["rank"], rounds, batch=at["tokens"] // TOKENS, config=config)
            methods = {method: METHODS[method] for method in ("lora", "full", "learner_unprimed")}
            if axis.endswith("adapters"):
                active = value if axis == "active_adapters" else 1
                # Without a new head, of which PEFT has only one active; the rank is that of all that are active.
                setting = replace(setting, task_type=None, rank=RANK_OF_SEVERAL * active)
                several = partial(several_adapters, count=value, active=active)
                methods |= {method: partial(several, method) for method in ("lora", "learner_unprimed")}
            yield Point(axis, value, setting, methods)


def several_adapters(method: str, work: Workload, count: int, active: int) -> Variant:
    """A model with several adapters of one kind, the first of them active.

    They are low-rank updates alone: PEFT's LoRA trains biases with one adapter only.
    """
    rank = work.setting.rank // active
    settings: dict[str, Any] = {"r": rank, "adapters": count, "active": active}
    own = {"priming_epochs": 0, "train_biases": False, "train_norms": False}

    def config() -> PeftConfig:
        if method == "lora":
            return LoraConfig(r=rank, lora_alpha=rank, target_modules=linear_layers(work))
        return LearnerConfig(r=rank, **own)

    model: Any = adapted(work, config())
    names = ["default", *(f"adapter_{number}" for number in range(1, count))]
    for name in names[1:]:
        model.add_adapter(name, config())
    if active > 1:
        model.base_model.set_adapter(names[:active])
    return trains(work, model, settings if method == "lora" else {**settings, **own})


def scaling_rows(
    measure: Callable[[Workload, dict[str, Build]], list[dict[str, Any]]],
    found: Iterable[Point],
    device: torch.device,
    seed: int = 0,
    fused: bool = True,
) -> Iterator[tuple[Workload, list[dict[str, Any]]]]:
    """The rows of each point, with `axis` and `value`.

    Args:
        measure: makes the rows of a workload's methods.
        found: the points.
    """
    for point in found:
        print(f"  {point.axis} {point.value}")
        work = prepare(point.setting, None, device, seed, fused)
        place = {"axis": point.axis, "value": point.value}
        yield work, [{**place, **row} for row in measure(work, point.methods)]
