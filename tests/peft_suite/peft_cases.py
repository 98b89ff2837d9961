"""What PEFT's own test-suite is run on (see test_peft_suite.py). Fields that PEFT's toy models need are given."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig

LIN0: dict[str, Any] = {"target_modules": ["lin0"]}
BOTH: dict[str, Any] = {"target_modules": ["lin0", "lin1"]}
PRIMED: dict[str, Any] = {"priming_modules": ["lin0"], "priming_epochs": 1}
CLASSES: dict[str, type] = {
    "Learner": LearnerConfig,
    "FAR": FARConfig,
    "NAS": NASLoRAConfig,
    "Bottleneck": BottleneckConfig,
}
NETWORK = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")


def cases() -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    """`(name, model, config class, fields)`; the model is one of PEFT's toys, or a family of transformers models."""
    mlp = {
        "lin0": LIN0,
        "both r=3": {**BOTH, "r": 3},
        "regex": {"target_modules": "lin0"},
        "all-linear": {"target_modules": "all-linear", "r": 4},
        "scaling": {**LIN0, "r": 4, "scaling": 0.5},
        "modules_to_save": {**LIN0, "r": 3, "modules_to_save": ["lin1"]},
        "dropout": {**LIN0, "learner_dropout": 0.1},
        "no biases": {**BOTH, "train_biases": False},
        "rank_pattern": {**BOTH, "rank_pattern": {"lin0": 2}},
        "in priming": {**BOTH, **PRIMED, "r": 3},
        "in priming, scaled": {**LIN0, **PRIMED, "r": 3, "priming_lr_scale": 0.5},
        "primed": {**LIN0, **PRIMED, "r": 3, "completed_phases": ["priming"]},
        "folded": {**LIN0, **PRIMED, "r": 3, "after_priming": "fold", "completed_phases": ["priming"]},
        "primed, dropout": {**LIN0, **PRIMED, "learner_dropout": 0.1, "completed_phases": ["priming"]},
    }
    for name, fields in mlp.items():
        yield f"Learner {name}", "MLP", LearnerConfig, fields
    yield "Learner Conv1D", "EmbConv1D", LearnerConfig, {"target_modules": ["conv1d"]}
    yield (
        "Learner Conv1D primed",
        "EmbConv1D",
        LearnerConfig,
        {
            "target_modules": ["conv1d"],
            "priming_modules": ["conv1d"],
            "completed_phases": ["priming"],
        },
    )
    yield "Learner norms", "MLP_LayerNorm", LearnerConfig, {"target_modules": ["layernorm0", "layernorm1", "lin0"]}
    yield "Learner norms alone", "MLP_LayerNorm", LearnerConfig, {"target_modules": ["layernorm0"]}
    yield from far_cases()
    yield from nas_cases()
    yield from bottleneck_cases()
    yield from families()


def far_cases() -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    pair: dict[str, Any] = {**BOTH, "ffn_modules": [["lin0", "lin1"]], "retention_ratio": 0.5}
    mlp = {
        "lin0": LIN0,
        "both": BOTH,
        "regex": {"target_modules": "lin0"},
        "all-linear": {"target_modules": "all-linear"},
        "modules_to_save": {**LIN0, "modules_to_save": ["lin1"]},
        "no biases": {**BOTH, "train_biases": False},
        "in priming": pair,
        "reconfigured": {**pair, "reconfigured": True},
        "reconfigured, discarded": {**pair, "reconfigured": True, "discard_unkept": True},
        "reconfigured rows": {**pair, "reconfigured": True, "granularity": "output_node"},
        "reconfigured, second layer": {**pair, "target_modules": ["lin1"], "reconfigured": True},
    }
    for name, fields in mlp.items():
        yield f"FAR {name}", "MLP", FARConfig, fields
    yield "FAR Conv1D", "EmbConv1D", FARConfig, {"target_modules": ["conv1d", "emb"]}
    yield "FAR norms", "MLP_LayerNorm", FARConfig, {"target_modules": ["layernorm0", "layernorm1", "lin0"]}
    yield "FAR convolutions", "Conv2d", FARConfig, {"target_modules": ["conv2d", "lin0"]}
    yield "FAR grouped convolutions", "Conv2dGroups", FARConfig, {"target_modules": ["conv2d"]}
    yield "FAR 3d convolutions", "Conv3d", FARConfig, {"target_modules": ["conv3d", "lin0"]}
    yield "FAR attention", "MHA", FARConfig, {"target_modules": ["mha", "lin0"]}


def nas_cases() -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    """With init="lora": PEFT's tests want a fresh adapter to change nothing."""
    lora: dict[str, Any] = {**BOTH, "r": 4, "init": "lora"}
    # MLP: lin0 10 -> 20, lin1 20 -> 2, both with a bias
    structured = {"lin0": {"U": [40, 80], "V": [20, 40], "bias": [20, 20]}, "lin1": {"U": [2, 8], "V": [20, 80]}}
    entries = {
        "lin0": {"U": [7, 80], "V": [9, 40], "bias": [5, 20]},
        "lin1": {"U": [3, 8], "V": [11, 80], "bias": [1, 2]},
    }
    small: dict[str, Any] = {**lora, "pruned_rounds": 1}
    mlp = {
        "lin0": {**LIN0, "r": 4, "init": "lora"},
        "both": lora,
        "structured": {**lora, "granularity": "structured"},
        "regex": {"target_modules": "lin0", "r": 3, "init": "lora"},
        "all-linear": {"target_modules": "all-linear", "init": "lora"},
        "modules_to_save": {**LIN0, "r": 3, "init": "lora", "modules_to_save": ["lin1"]},
        "no biases": {**lora, "train_biases": False},
        "biases": {"r": 0},
        "biases of lin0": {**LIN0, "r": 0},
        "structured biases": {"r": 0, "granularity": "structured"},
        "pruned, structured": {
            **small,
            "granularity": "structured",
            "architecture": structured,
            "init_weights": False,
        },
        "pruned entries": {**small, "architecture": entries, "init_weights": False},
    }
    for name, fields in mlp.items():
        yield f"NAS {name}", "MLP", NASLoRAConfig, fields
    yield "NAS Conv1D", "EmbConv1D", NASLoRAConfig, {"target_modules": ["conv1d"], "init": "lora"}
    yield "NAS norms", "MLP_LayerNorm", NASLoRAConfig, {"r": 0, "target_modules": ["layernorm0", "layernorm1", "lin0"]}
    yield "NAS convolutions", "Conv2d", NASLoRAConfig, {"r": 0, "target_modules": ["conv2d", "lin0"]}
    yield "NAS 3d convolutions", "Conv3d", NASLoRAConfig, {"r": 0, "target_modules": ["conv3d", "lin0"]}


def bottleneck_cases() -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    """Sequential: the toys have no feed-forward network that leads back to its own size."""
    small: dict[str, Any] = {**BOTH, "bottleneck_dim": 4}
    mlp = {
        "lin0": LIN0,
        "both": small,
        "regex": {"target_modules": "lin0"},
        "all-linear": {"target_modules": "all-linear", "bottleneck_dim": 3},
        "modules_to_save": {**LIN0, "modules_to_save": ["lin1"]},
        "scaling": {**small, "scaling": 0.5, "non_linearity": "gelu"},
        "dropout": {**LIN0, "dropout": 0.1},
    }
    for name, fields in mlp.items():
        yield f"Bottleneck {name}", "MLP", BottleneckConfig, fields
    yield "Bottleneck Conv1D", "EmbConv1D", BottleneckConfig, {"target_modules": ["conv1d"]}
    norms = {"target_modules": ["layernorm0", "layernorm1", "lin0"]}
    yield "Bottleneck norms", "MLP_LayerNorm", BottleneckConfig, norms


def families() -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    tasks = {
        "decoder": "CAUSAL_LM",
        "encoder": "FEATURE_EXTRACTION",
        "sequence classification": "SEQ_CLS",
        "encoder-decoder": "SEQ_2_SEQ_LM",
        "token classification": "TOKEN_CLS",
        "question answering": "QUESTION_ANS",
    }
    for family, task in tasks.items():
        yield f"Learner {task}", family, LearnerConfig, {"task_type": task, "r": 8}
        yield f"Learner {task} unprimed", family, LearnerConfig, {"task_type": task, "r": 4, "priming_epochs": 0}
        # PEFT's training tests of the other families want a gradient on every adapter parameter, which the frozen
        # deltas of a primed adapter can't have; tests/contract/test_contract.py trains those.
        if family in ("sequence classification", "token classification", "question answering"):
            fields = {"task_type": task, "r": 4, "completed_phases": ["priming"]}
            yield f"Learner {task} primed", family, LearnerConfig, fields
        yield f"FAR {task}", family, FARConfig, {"task_type": task}
        fields = {"task_type": task, "train_embeddings": False, "reconfigured": True}
        yield f"FAR small {task} reconfigured", family, FARConfig, fields
        fields = {"task_type": task, "r": 4, "init": "lora"}
        yield f"NAS {task}", family, NASLoRAConfig, fields
        yield f"NAS {task} structured", family, NASLoRAConfig, {**fields, "granularity": "structured"}
        yield f"Bottleneck {task}", family, BottleneckConfig, {"task_type": task, "bottleneck_dim": 8}
        fields = {"task_type": task, "bottleneck_dim": 8, "mode": "parallel", "scaling": 1.0}
        yield f"Bottleneck {task} parallel", family, BottleneckConfig, fields


def covered(family: str, config: type, fields: dict[str, Any], model: int, models: int) -> bool:
    """Whether a case of a family runs on a model of it. Not all do on all: each model has one or two cases of each
    tuner, each case one or two models. (The contract tests are the full product of tuners and architectures.)

    Args:
        model: its number.
        models: how many the family has.
    """
    variants = [theirs for _, of, cls, theirs in families() if (of, cls) == (family, config)]
    return (variants.index(fields) - model) % min(len(variants), models) == 0


def pairs() -> Iterator[tuple[str, str, type, dict[str, Any], dict[str, Any]]]:
    """Two active adapters."""
    one = {**LIN0, "r": 3, "init_weights": False}
    yield "Learner same layer", "learner", LearnerConfig, one, {**one, "r": 5}
    yield "Learner other layer", "learner", LearnerConfig, one, {**one, "target_modules": ["lin1"]}
    yield "Learner both primed", "learner", LearnerConfig, {**one, **PRIMED}, {**one, **PRIMED}
    two: dict[str, Any] = {**LIN0, "init_weights": False}
    cut = {**two, "ffn_modules": [["lin0", "lin1"]], "retention_ratio": 0.5, "reconfigured": True}
    yield "FAR same layer", "far", FARConfig, two, two
    yield "FAR other layer", "far", FARConfig, two, {**two, "target_modules": ["lin1"]}
    yield "FAR reconfigured", "far", FARConfig, cut, {**cut, "retention_ratio": 0.25}
    three: dict[str, Any] = {**one, "granularity": "unstructured"}
    yield "NAS same layer", "nas_lora", NASLoRAConfig, three, {**three, "r": 5}
    yield "NAS other layer", "nas_lora", NASLoRAConfig, three, {**three, "target_modules": ["lin1"]}
    yield "NAS biases", "nas_lora", NASLoRAConfig, {**three, "r": 0}, {**three, "granularity": "structured"}
    four: dict[str, Any] = {**two, "bottleneck_dim": 4}
    yield "Bottleneck same layer", "bottleneck", BottleneckConfig, four, {**four, "bottleneck_dim": 8}
    yield "Bottleneck other layer", "bottleneck", BottleneckConfig, four, {**four, "target_modules": ["lin1"]}


def mixed(test: str) -> Iterator[tuple[str, PeftConfig, PeftConfig]]:
    """Two adapters for a test of mixed batches, on the layers that it is about."""
    learner, far, nas, bottleneck = (functools.partial(of, init_weights=False) for of in CLASSES.values())

    def each(name: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[tuple[str, PeftConfig, PeftConfig]]:
        for tuner, of in zip(CLASSES, (learner, far, nas, bottleneck), strict=True):
            yield f"{tuner} {name}", of(**one), of(**two)

    conv1d, conv2d = {"target_modules": ["conv1d"]}, {"target_modules": ["conv2d"]}
    match test.removeprefix("test_mixed_adapter_batches_"):
        case "different_target_layers":
            yield from each("other layer", LIN0, {"target_modules": ["lin1"]})
        case "partly_overlapping_target_layers":
            yield from each("overlapping", LIN0, BOTH)
        case "multiple_modules_to_save":
            yield from each("modules_to_save", *[{**LIN0, "modules_to_save": ["lin1"]}] * 2)
        case "unsupported_layer_raises":
            yield from each("GRU to save", *[{**LIN0, "modules_to_save": ["gru"]}] * 2)
        case "lora_conv1d_emb_multiple_modules_to_save":
            yield from each("Conv1D, modules_to_save", *[{**conv1d, "modules_to_save": ["lin0"]}] * 2)
        case "lora_conv1d_emb":
            yield "Learner Conv1D", learner(**conv1d), learner(**conv1d, r=3)
            yield "FAR Conv1D", far(target_modules=["conv1d", "emb"]), far(target_modules=["emb"])
            yield "NAS Conv1D", nas(**conv1d), nas(**conv1d, r=3)
            yield "Bottleneck Conv1D", bottleneck(**conv1d), bottleneck(**conv1d, bottleneck_dim=3)
        case "lora_conv2d":
            yield "FAR convolution", far(**conv2d), far(**conv2d, train_biases=False)
            yield "NAS convolution", nas(**conv2d, r=0), nas(**conv2d, r=0, granularity="structured")
        case _:
            yield "Learner mixed", learner(**LIN0, r=3), learner(**LIN0, r=6)
            yield "Learner mixed primed", learner(**LIN0, r=3, **PRIMED), learner(**LIN0, r=6)
            yield "FAR mixed", far(**LIN0), far(**LIN0, train_biases=False)
            yield "NAS mixed", nas(**LIN0, r=3), nas(**LIN0, r=6, train_biases=False)
            yield "Bottleneck mixed", bottleneck(**LIN0, bottleneck_dim=3), bottleneck(**LIN0, non_linearity="gelu")


def single() -> Iterator[tuple[str, PeftConfig]]:
    """One adapter that changes what the model computes."""
    for name, of in CLASSES.items():
        yield f"{name} lin0", of(**LIN0, init_weights=False)


def by_regex() -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Target modules by a regex that would match what an adapter adds below them."""
    for name, of in CLASSES.items():
        yield f"{name} linear", of, {"target_modules": "l1.*"}
    yield "FAR convolution", FARConfig, {"target_modules": "l2.*"}
    yield "NAS convolution", NASLoRAConfig, {"target_modules": "l2.*", "r": 0, "parameter_budget": 1}


def skipped(test: str, case: str) -> str | None:
    """Why a test of PEFT's can't hold for a case, and what would let it run.

    Args:
        case: the test's parameters, as pytest writes them.
    """
    if "Bottleneck" in case and ("merg" in test or test.startswith(("test_forward_float16", "test_forward_bfloat16"))):
        return "merges -- runs for tuners whose updates a weight can hold, and a bottleneck adapter is not linear"
    if test in NETWORK:
        return "fetches a config from the Hub -- runs once CI may depend on the Hub: peft_suite/runner.py is offline"
    if test.startswith("test_prepare_for_training") and "FAR" in case and "small" not in case:
        return "wants no gradient at the embeddings' output -- runs for FAR with train_embeddings=False (FAR small)"
    if test.startswith("test_disable_adapters") and "NAS pruned" in case:
        return "wants an adapter that changes nothing -- runs for one that is not pruned: values come with the pruning"
    if test == "test_save_load_roundtrip_fsdp_wrapped" and case == "FAR attention":
        return "ours raises: FSDP hides parameters that functional_call needs for composites -- runs for others"
    return None
