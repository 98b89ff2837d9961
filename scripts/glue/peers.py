"""What this package's methods are compared with in `scripts.glue.train`: PEFT's methods, and models trained in place.

AdaLoRA is in `adalora.py`: PEFT leaves more of it to who trains.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, ShiraConfig, get_peft_model
from transformers import PreTrainedModel

from peft_learners import BottleneckConfig, LearnerConfig
from scripts.glue.method_arguments import MethodArguments

#: Parts of a primed Learner by the parameter of the layer that each changes; its low-rank matrices are none of them.
LEARNER_PARTS = {"learner_dense_delta": "weight", "learner_layernorm_delta": "weight", "learner_bias_delta": "bias"}


def head(model: PreTrainedModel) -> list[str]:
    """Names of the new head's modules: what has parameters and lies outside the backbone. A language model's head is
    pretrained, and none of these."""
    if model.get_output_embeddings() is not None:
        return []
    outside = ((name, child) for name, child in model.named_children() if name != model.base_model_prefix)
    return [name for name, child in outside if any(True for _ in child.parameters())]


# -- in place --------------------------------------------------------------------------------------------------------


def full(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """All parameters of the model."""
    return model


def bitfit(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """BitFit (Zaken et al., 2021): all biases of the backbone, norms' included, and the head, in place.

    Raises:
        ValueError: a backbone without biases.
    """
    backbone = f"{model.base_model_prefix}."
    # DeBERTa has its own: q_bias and v_bias.
    biases = {n for n, _ in model.named_parameters() if n.startswith(backbone) and n.endswith((".bias", "_bias"))}
    if not biases:
        raise ValueError(
            f"--method bitfit trains biases, and the backbone of {type(model).__name__} has none. Take another model, "
            "or another method: --method lora."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(backbone) or name in biases)
    return model


def freeze_ffns(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """FREEZE FFNs (arXiv 2208.02070, Table 1): the attention, the biases of all linear layers of the backbone, the
    norms in its blocks, and the head, in place.

    That is what a Learner trains in its priming, low-rank matrices aside; so one, without memory, says what it is.

    Raises:
        ValueError: a model without an attention.
    """
    learner: Any = get_peft_model(copy.deepcopy(model).to("meta"), LearnerConfig(r=1, priming_steps=1))
    trained, attention = set(), False
    for name, _ in learner.base_model.model.named_parameters():
        layer, _, part = name.partition(".default.")[0].rpartition(".")
        attention |= part == "learner_dense_delta"
        if part in LEARNER_PARTS:
            trained.add(f"{layer}.{LEARNER_PARTS[part]}")
    if not attention:
        raise ValueError(
            f"--method freeze_ffns trains the attention, and none was found in {type(model).__name__}. Take another "
            "model, or a method that needs none: --method bitfit."
        )
    in_head = tuple(f"{name}." for name in head(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or name.startswith(in_head))
    return model


# -- adapters --------------------------------------------------------------------------------------------------------


def lora(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """LoRA on every linear layer. lora_alpha=r: a scaling of 1, as Learners without priming have it."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=args.r,
        lora_alpha=args.r,
        target_modules="all-linear",
        modules_to_save=head(model),  # by itself PEFT takes a part of DistilBERT's for a linear layer of the backbone
        lora_dropout=args.dropout,
    )
    return get_peft_model(model, config)


def mam(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """Uniform LoRA on query, key and every `dense` of the blocks, and all biases: the peer of S-MaM and U-MaM
    (arXiv 2305.16597, section 4.1; BERT's, RoBERTa's and DistilBERT's names). lora_alpha=r: a scaling of 1.

    Raises:
        ValueError: a model with other names.
    """
    targets = r".*\.layer\.\d+\..*(query|key|dense|q_lin|k_lin|out_lin|lin1|lin2)"
    names = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    for what, ends in (("query", ("query", "q_lin")), ("key", ("key", "k_lin"))):
        if not any(name.endswith(ends) for name in names):
            raise ValueError(
                f"--method mam knows attentions by the names of BERT's, RoBERTa's and DistilBERT's, and found no "
                f"{what} ({' or '.join(ends)}) in {type(model).__name__}. Take such a model, or another method: "
                "--method lora."
            )
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=args.r,
        lora_alpha=args.r,
        target_modules=targets,
        modules_to_save=head(model),
        bias="all",
        lora_dropout=args.dropout,
    )
    return get_peft_model(model, config)


def shira(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """SHiRA (Bhardwaj et al., 2024) on every linear layer of the backbone: as many of its weight's entries as LoRA of
    the rank has, r (in_features + out_features), drawn by the run's seed, alike in layers of one shape. No biases."""
    config = ShiraConfig(
        task_type="SEQ_CLS",
        r=args.r,
        target_modules="all-linear",
        modules_to_save=head(model),
        random_seed=torch.initial_seed(),
    )
    return get_peft_model(model, config)


def prompt_tuning(model: PreTrainedModel, args: MethodArguments, task_type: str | None = "SEQ_CLS") -> torch.nn.Module:
    """Prompt tuning (Lester et al., 2021): trained embeddings before the tokens of each example, random at first."""
    config = PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=args.num_virtual_tokens,
        modules_to_save=head(model),
        # PEFT does not find DistilBERT's.
        token_dim=model.config.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
    )
    return get_peft_model(model, config)


def bottleneck(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """Bottleneck adapters, sequential (Houlsby et al., 2019) or parallel to the FFN (He et al., 2022)."""
    config = BottleneckConfig(task_type="SEQ_CLS", mode=args.mode, bottleneck_dim=args.bottleneck_dim)
    return get_peft_model(model, config)
