"""AdaLoRA in the Trainer. PEFT leaves its schedule, its calls and its state in checkpoints to who trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from scripts.glue.method_arguments import MethodArguments
from scripts.glue.peers import head

#: Rank at first, relative to the mean rank in the end (the paper, section 4).
INITIAL_RANK = 1.5
#: Shares of the steps before the ranks begin to fall, and after they have fallen. The paper's settings for GLUE have
#: 9 to 18 % and 44 to 58 %.
WARM_UP, FINAL = 0.15, 0.5
#: PEFT's averages of the importance, by the names that they have in PEFT and here in the optimizer's state.
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


def adalora(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512) on every linear layer of the backbone; needs `AdaLoraCallback`.

    The rank is 1.5 r in each layer at first, and r in the mean in the end. lora_alpha is the rank at first: a scaling
    of 1. The losses hold PEFT's orthogonal regularisation, in evaluation too.
    """
    assert args.r is not None
    rank = math.ceil(INITIAL_RANK * args.r)
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=rank,
        target_r=args.r,
        lora_alpha=rank,
        target_modules="all-linear",
        modules_to_save=head(model),
        lora_dropout=args.dropout,
        total_step=1,  # set when training starts
    )
    return get_peft_model(model, config)


class AdaLoraCallback(TrainerCallback):
    """Sets AdaLoRA's schedule, and has ranks scored and masked after each optimizer step.

    A resumed training does the same as one that was never stopped. For that, the averages of the importance are in
    the optimizer's state, which is in each checkpoint; and PEFT's config does not say which ranks are masked, since
    PEFT would leave these out of a checkpoint, though they may come back. When training ends it says so, and what is
    saved from then on is without them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Set the schedule; in a resumed training, take up the state.

        Raises:
            ValueError: a training of a single step.
        """
        tuner, optimizer = kwargs["model"].base_model, kwargs["optimizer"]
        steps = state.max_steps
        if steps < 2:
            raise ValueError(
                f"AdaLoRA needs at least 2 optimizer steps, one to score ranks and one to mask them, got {steps}. "
                "Train for longer: --num_train_epochs or --max_steps."
            )
        config, allocator = tuner.peft_config[tuner.trainable_adapter_name], tuner.rankallocator
        config.total_step = steps
        config.tfinal = min(int(FINAL * steps), steps - 2)  # there must be scores when the last ranks are masked
        config.tinit = min(int(WARM_UP * steps), steps - config.tfinal - 1)
        allocator.reset_ipt()
        for name, parameter in low_rank_parameters(tuner):
            found = optimizer.state[parameter] if parameter in optimizer.state else {}
            if all(kind in found for kind in AVERAGES):
                allocator.ipt[name] = torch.zeros_like(parameter)
                for kind in AVERAGES:
                    getattr(allocator, kind)[name] = found[kind]
        self._kept = kept_ranks(tuner) if state.global_step >= steps - config.tfinal else None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        tuner, optimizer = kwargs["model"].base_model, kwargs["optimizer"]
        config, allocator = tuner.peft_config[tuner.trainable_adapter_name], tuner.rankallocator
        config.rank_pattern = self._kept
        tuner.update_and_allocate(state.global_step + 1)
        self._kept, config.rank_pattern = config.rank_pattern, None
        for name, parameter in low_rank_parameters(tuner):
            for kind in AVERAGES:
                average = getattr(allocator, kind).get(name)
                if average is not None:
                    optimizer.state[parameter][kind] = average
                else:
                    optimizer.state[parameter].pop(kind, None)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        tuner = kwargs["model"].base_model
        # Those of the best checkpoint, if that one is back.
        tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = kept_ranks(tuner)


def low_rank_parameters(tuner: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A, B and the scales E of all layers, by the names that PEFT's allocator knows them by."""
    for name, parameter in tuner.model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            yield name, parameter


def kept_ranks(tuner: Any) -> dict[str, list[bool]]:
    """Which ranks have an effect, as PEFT's `rank_pattern`: their scales are not zero."""
    scales = ((name, value) for name, value in low_rank_parameters(tuner) if "lora_E" in name)
    return {name: (value != 0).view(-1).tolist() for name, value in scales}
