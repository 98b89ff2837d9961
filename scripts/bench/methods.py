"""The methods that the benchmark compares. A new one is a function, an entry in `METHODS` and a place in `GROUPS`."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Optional

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, ShiraConfig, get_peft_model

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig, PhaseDriver
from scripts.bench.measure import Variant, take_step, trained_parameters
from scripts.bench.settings import Workload
from scripts.glue.method_arguments import MethodArguments
from scripts.glue.peers import bitfit as bitfit_in_place
from scripts.glue.peers import freeze_ffns as freeze_ffns_in_place
from scripts.glue.peers import prompt_tuning as with_prompt

#: Of a training that is never over while it is measured.
LONG = 1_000_000
RETENTION_RATIO = 0.1
SEARCH_STEPS = 2
VIRTUAL_TOKENS = 20
#: Width of a bottleneck adapter relative to the rank: 256 and 512, as in arXiv 2208.02070, where Learners have 64.
BOTTLENECK_TO_RANK = {"sequential": 4, "parallel": 8}
SPACES = {"u_mam": NASLoRAConfig.u_mam, "s_mam": NASLoRAConfig.s_mam, "u_bitfit": NASLoRAConfig.u_bitfit}
Build = Callable[[Workload], Variant]


def trains(work: Workload, model: torch.nn.Module, settings: dict[str, Any], **more: Any) -> Variant:
    """A variant that trains with AdamW what requires a gradient now.

    Args:
        more: further attributes of the variant.
    """
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=2e-5, fused=work.fused)
    return Variant(model.train(), optimizer, settings, **more)


def adapted(work: Workload, config: PeftConfig) -> torch.nn.Module:
    """A copy of the model with a fresh adapter."""
    return get_peft_model(copy.deepcopy(work.base), config)


def has_biases(work: Workload) -> bool:
    """Whether the model's backbone has any bias, a new head aside."""
    prefix = f"{work.base.base_model_prefix}."
    return any(name.startswith(prefix) and name.endswith(".bias") for name, _ in work.base.named_parameters())


def linear_layers(work: Workload) -> list[str]:
    """Names of the linear layers that a Learner adapts: all of the backbone. Others get the same."""
    if not work.linear_layers:
        peer: Any = adapted(work, LearnerConfig(r=1, priming_epochs=0, task_type=work.setting.task_type))
        layers = peer.base_model.model
        work.linear_layers += [n for n in peer.targeted_module_names if hasattr(layers.get_submodule(n), "learner_P1")]
    return work.linear_layers


# -- PEFT's and whole models ---------------------------------------------------------------------------------------


def full(work: Workload) -> Variant:
    return trains(work, copy.deepcopy(work.base), {})


def lora(work: Workload, **more: Any) -> Variant:
    """LoRA that trains what a Learner without norms does: all linear layers of the backbone and their biases."""
    rank = work.setting.rank
    settings = {"r": rank, "lora_alpha": rank, "bias": "lora_only" if has_biases(work) else "none", **more}
    config = LoraConfig(task_type=work.setting.task_type, target_modules=linear_layers(work), **settings)
    return trains(work, adapted(work, config), settings, saves=True)


def adalora(work: Workload) -> Variant:
    """AdaLoRA on its way from the rank to half of it: a mask is found and applied after every step."""
    rank = work.setting.rank
    settings = {"init_r": rank, "target_r": max(1, rank // 2), "lora_alpha": rank, "total_step": LONG}
    settings["bias"] = "lora_only" if has_biases(work) else "none"
    config = AdaLoraConfig(task_type=work.setting.task_type, target_modules=linear_layers(work), **settings)
    model: Any = adapted(work, config)
    steps, allocator = count(1), model.base_model.rankallocator

    def allocate() -> None:
        model.base_model.update_and_allocate(next(steps))

    def averages() -> Iterable[torch.Tensor]:
        kept = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        return [value for name in kept for value in getattr(allocator, name).values()]

    return trains(work, model, settings, saves=True, after_step=allocate, state=averages)


def shira(work: Workload) -> Variant:
    """SHiRA of as many values per linear layer as LoRA of the rank: r (in + out). It trains no biases."""
    settings = {"r": work.setting.rank, "random_seed": work.seed}
    config = ShiraConfig(task_type=work.setting.task_type, target_modules=linear_layers(work), **settings)
    return trains(work, adapted(work, config), settings, saves=True)


def bitfit(work: Workload) -> Variant:
    if not has_biases(work):
        raise ValueError("The model has no biases.")
    return trains(work, bitfit_in_place(copy.deepcopy(work.base), MethodArguments()), {})


def freeze_ffns(work: Workload) -> Variant:
    return trains(work, freeze_ffns_in_place(copy.deepcopy(work.base), MethodArguments()), {})


def prompt_tuning(work: Workload) -> Variant:
    """Trained embeddings before each row: steps are longer by these tokens."""
    positions = getattr(work.base.config, "max_position_embeddings", LONG)
    if work.setting.tokens + VIRTUAL_TOKENS > positions:
        raise ValueError(f"The model has {positions} positions, too few for {VIRTUAL_TOKENS} tokens more.")
    args = MethodArguments(num_virtual_tokens=VIRTUAL_TOKENS)
    model = with_prompt(copy.deepcopy(work.base), args, work.setting.task_type)
    return trains(work, model, {"num_virtual_tokens": VIRTUAL_TOKENS}, saves=True)


def bottleneck(work: Workload, mode: str) -> Variant:
    """Bottleneck adapters, sequential or parallel, of about as many parameters as LoRA of the rank."""
    settings = {"mode": mode, "bottleneck_dim": BOTTLENECK_TO_RANK[mode] * work.setting.rank}
    config = BottleneckConfig(task_type=work.setting.task_type, **settings)
    return trains(work, adapted(work, config), settings, saves=True)


# -- Learners and FAR ----------------------------------------------------------------------------------------------


def learner(work: Workload, primed: Optional[bool] = None, **more: Any) -> Variant:
    """A Learner past its priming (of one step), in it, or without any (None)."""
    settings = {"r": work.setting.rank, **more}
    if primed is None:
        settings["priming_epochs"] = 0
        config = LearnerConfig(task_type=work.setting.task_type, **settings)
        return trains(work, adapted(work, config), settings, phase="learning", saves=True)
    settings.setdefault("priming_lr_scale", 1.0)  # as in the committed rows; another scale takes a pass more
    config = LearnerConfig(task_type=work.setting.task_type, priming_steps=1 if primed else LONG - 1, **settings)
    return _phased(work, trains(work, adapted(work, config), settings, phase="priming"), primed, "learning")


def far(work: Workload, after: bool, **more: Any) -> Variant:
    """FAR after its priming (of one step), or in it."""
    settings = {"retention_ratio": RETENTION_RATIO, "granularity": "hidden_unit", **more}
    config = FARConfig(task_type=work.setting.task_type, priming_steps=1 if after else LONG - 1, **settings)
    return _phased(work, trains(work, adapted(work, config), settings, phase="priming"), after, "reconfigured")


def _phased(work: Workload, variant: Variant, past: bool, phase: str) -> Variant:
    """Take a first step, cross the boundary or don't, and drive the phases with every step, as training does."""
    tuner: Any = variant.model.base_model
    tuner.set_schedule(total_steps=LONG, optimizer=variant.optimizer)
    take_step(variant, work.rows)
    if past:
        tuner.update_and_allocate(1)
        variant.phase, variant.saves = phase, True
    variant.after_step = partial(tuner.update_and_allocate, 1)
    return variant


# -- NAS-LoRA ------------------------------------------------------------------------------------------------------


def nas_lora(work: Workload, space: str, share: float) -> Variant:
    config = SPACES[space](share, search_steps=SEARCH_STEPS, task_type=work.setting.task_type)
    settings = {"space": space, **{name: getattr(config, name) for name in ("r", "granularity", "parameter_budget")}}
    return trains(work, adapted(work, config), settings, phase="search")


def nas_search(work: Workload, space: str, gathers: bool) -> Variant:
    """An adapter in its search, which gathers importance or doesn't.

    The hook that gathers is on the variant's optimizer while that takes a step, and gone otherwise. Both kinds are
    treated alike before their steps, because what that does warms caches; but scores are held by the one that gathers
    alone.
    """
    variant = nas_lora(work, space, 0.5)
    tuner: Any = variant.model.base_model
    driver = PhaseDriver.of(variant.model)
    start = partial(tuner.set_schedule, total_steps=2 * SEARCH_STEPS, optimizer=variant.optimizer)

    @contextmanager
    def in_search() -> Iterator[None]:
        # As a resumed training, which goes on with the scores that there are, or at the start, where there are none.
        start(global_step=int(gathers))
        if not gathers:
            driver.finish()
        yield
        driver.finish()

    start()
    take_step(variant, work.rows)  # the first scores
    driver.finish()
    layers = [module for module in variant.model.modules() if hasattr(module, "nas_lora_scores")]

    def scores() -> Iterable[torch.Tensor]:
        return [score for layer in layers for own in layer.nas_lora_scores.values() for score in own.values()]

    if not gathers:
        for layer in layers:
            layer.nas_lora_scores.clear()
    variant.around, variant.state = in_search, scores
    if gathers:
        variant.after_step = partial(tuner.update_and_allocate, 1)
    return variant


def nas_retrain(work: Workload, space: str, share: float) -> Variant:
    """An adapter after a search, with steps that train, and pruning to a share of its search space."""
    variant = nas_lora(work, space, share)
    tuner: Any = variant.model.base_model
    tuner.set_schedule(total_steps=2 * SEARCH_STEPS, optimizer=variant.optimizer)
    for step in range(1, SEARCH_STEPS + 1):
        take_step(variant, work.rows)
        tuner.update_and_allocate(step)
    found = tuner.architecture()
    variant.settings.update(search_space=found.space, kept=found.kept)
    variant.after_step = partial(tuner.update_and_allocate, SEARCH_STEPS + 1)
    variant.phase, variant.saves = "retraining", True
    return variant


def lora_mam(work: Workload) -> Variant:
    """PEFT's LoRA of half the search's rank on NAS-LoRA's linear layers, with all biases and the same head."""
    peer: Any = nas_lora(work, "s_mam", 0.5).model
    own = peer.peft_config["default"]
    rank = own.r // 2
    settings = {"r": rank, "lora_alpha": rank, "bias": "all" if has_biases(work) else "none"}
    config = LoraConfig(
        task_type=work.setting.task_type,
        target_modules=sorted(own.target_modules),
        modules_to_save=own.modules_to_save,
        **settings,
    )
    return trains(work, adapted(work, config), settings, saves=True)


# -- inference -----------------------------------------------------------------------------------------------------


def inference(build: Build, work: Workload, merged: bool = False) -> Variant:
    """A method's model as it is used: no gradients, adapters as they are or merged."""
    trained = build(work)
    model: Any = trained.model
    if merged:
        model.merge_adapter()
    model.eval().requires_grad_(False)
    return Variant(model, None, {**trained.settings, "merged": merged}, phase="inference")


METHODS: dict[str, Build] = {
    "lora": lora,
    "full": full,
    "learner_priming": partial(learner, primed=False),
    "learner_primed": partial(learner, primed=True),
    "learner_unprimed": learner,
    "learner_unprimed_no_norms": partial(learner, train_norms=False),
    "far_priming": partial(far, after=False),
    "far_after": partial(far, after=True),
    "far_after_discard": partial(far, after=True, discard_unkept=True),
    "far_after_output_node": partial(far, after=True, granularity="output_node"),
    "lora_dora": partial(lora, use_dora=True),
    "adalora": adalora,
    "shira": shira,
    "nas_plain": partial(nas_search, space="u_mam", gathers=False),
    "nas_search": partial(nas_search, space="u_mam", gathers=True),
    "nas_plain_s_mam": partial(nas_search, space="s_mam", gathers=False),
    "nas_search_s_mam": partial(nas_search, space="s_mam", gathers=True),
    "nas_plain_u_bitfit": partial(nas_search, space="u_bitfit", gathers=False),
    "nas_search_u_bitfit": partial(nas_search, space="u_bitfit", gathers=True),
    "lora_mam": lora_mam,
    "nas_retrain_structured": partial(nas_retrain, space="s_mam", share=0.5),
    "nas_retrain_unstructured": partial(nas_retrain, space="u_mam", share=0.5),
    "bitfit": bitfit,
    "freeze_ffns": freeze_ffns,
    "adapter_sequential": partial(bottleneck, mode="sequential"),
    "adapter_parallel": partial(bottleneck, mode="parallel"),
    "prompt_tuning": prompt_tuning,
    "u_bitfit_10": partial(nas_retrain, space="u_bitfit", share=0.1),
    "inference_base": partial(inference, full),
    "inference_lora": partial(inference, lora),
    "inference_learner": partial(inference, partial(learner, primed=True)),
    "inference_learner_unprimed": partial(inference, learner),
    "inference_learner_merged": partial(inference, partial(learner, primed=True), merged=True),
}
_BOTH = ("lora", "full")
#: Methods that are held at once and take their steps in turn. Each group has references of its own.
GROUPS: dict[str, tuple[str, ...]] = {
    "learner": (*_BOTH, "learner_priming", "learner_primed", "learner_unprimed", "learner_unprimed_no_norms"),
    "far": ("full", "far_priming", "far_after", "far_after_discard", "far_after_output_node"),
    "peft": (*_BOTH, "lora_dora", "adalora", "shira"),
    "peers": (
        *(*_BOTH, "freeze_ffns", "adapter_sequential", "adapter_parallel"),
        *("prompt_tuning", "lora_mam", "bitfit"),
    ),
    "nas_search": (*_BOTH, "nas_plain", "nas_search"),
    "nas_search_more": (
        *(*_BOTH, "nas_plain_s_mam", "nas_search_s_mam"),
        *("nas_plain_u_bitfit", "nas_search_u_bitfit"),
    ),
    "nas_retrain": (
        *(*_BOTH, "lora_mam", "nas_retrain_structured", "nas_retrain_unstructured"),
        *("bitfit", "u_bitfit_10"),
    ),
    "inference": (
        *("inference_base", "inference_lora", "inference_learner", "inference_learner_unprimed"),
        "inference_learner_merged",
    ),
}
#: What a method is compared with before others, where that is not LoRA.
REFERENCES = {
    **dict.fromkeys(("lora", *GROUPS["far"][1:]), "full"),
    **{f"nas_search{space}": f"nas_plain{space}" for space in ("", "_s_mam", "_u_bitfit")},
    "nas_retrain_structured": "lora_mam",
    "nas_retrain_unstructured": "lora_mam",
    "u_bitfit_10": "bitfit",
    **dict.fromkeys(GROUPS["inference"], "inference_base"),
}


def references_of(method: str) -> list[str]:
    """The methods with which one is compared, the most telling first."""
    # FAR is full fine-tuning with less. Beside its large models LoRA's steps meet another heap than elsewhere.
    others = [] if method.startswith(("inference", "far")) else ["lora", "full"]
    own = REFERENCES.get(method, "lora")
    return [own, *(name for name in others if name != own)]
