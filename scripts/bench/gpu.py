"""Checks and times everything on one GPU, in a few minutes: what tests on a CPU can't see.

    bash scripts/bench/gpu.sh                                        # records to results/gpu
    bash scripts/bench/gpu.sh --only compiled speed --methods far    # a part
    bash scripts/bench/gpu.sh --device cpu --small                   # a rehearsal where there is no GPU

It needs the repository, torch, transformers, peft and accelerate; models are random, made from configs. Each check
writes a record of its own as soon as it is done, `<check>-<model>-<method>.json`, so that a run that is cut off keeps
what is finished. A record has `passed` (None: it did not run, and `skipped` says why), the `error` of a check that did
not pass, and `numbers`. A check that runs into the end of the budget has the error of that; those after it are
skipped. Where a check leaves the GPU unusable for its process, a new process goes on with the next one.
"""

import argparse
import copy
import faulthandler
import gc
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch.nn.functional import linear
from transformers import LlamaConfig, PrinterCallback, Trainer, TrainingArguments

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig, PhaseCallback
from peft_learners.ops.delta_linear import effective_linear, separate_linear
from peft_learners.phases.optimizer import raw_optimizer
from peft_learners.phases.schedule import ScheduleError
from scripts.bench.measure import (
    Variant,
    measure_bytes,
    peak_step_bytes,
    quartiles,
    take_rounds,
    time_ratios,
    trained_parameters,
)
from scripts.bench.methods import METHODS, Build, learner
from scripts.bench.settings import SETTINGS, Setting, Workload, prepare, small_bert
from scripts.glue import run_record

#: Optimizer steps of a check, and how many of them lie before the boundary.
STEPS, BOUNDARY = 6, 3
LR = 2e-4
#: Seconds that one check may take.
MOST_SECONDS = 120
Numbers = dict[str, Any]

ADAPTERS: dict[str, Callable[[str], PeftConfig]] = {
    "lora": lambda task: LoraConfig(task_type=task, r=8, target_modules="all-linear"),
    "learner_kept": lambda task: LearnerConfig(task_type=task, r=8, priming_steps=BOUNDARY),
    "learner_folded": lambda task: LearnerConfig(task_type=task, r=8, priming_steps=BOUNDARY, after_priming="fold"),
    "far": lambda task: FARConfig(task_type=task, retention_ratio=0.25, priming_steps=BOUNDARY),
    "nas_unstructured": lambda task: NASLoRAConfig.u_mam(0.5, search_steps=BOUNDARY, task_type=task),
    "nas_structured": lambda task: NASLoRAConfig.s_mam(0.5, search_steps=BOUNDARY, task_type=task),
    "bottleneck": lambda task: BottleneckConfig(task_type=task, bottleneck_dim=8),
}
#: Whose steps are timed. What is folded are the dense deltas of the first block alone, since the SVDs of all of them
#: take longer than all steps here; past the fold the layers of all blocks are alike.
TIMED: dict[str, Build] = {
    "lora": METHODS["lora"],
    "learner_priming": METHODS["learner_priming"],
    "learner_kept": METHODS["learner_primed"],
    "learner_folded": partial(learner, primed=True, after_priming="fold", priming_modules=[0]),
    "far_priming": METHODS["far_priming"],
    "far_reconfigured": METHODS["far_after"],
    "nas_search": METHODS["nas_search"],
    "nas_retraining_unstructured": METHODS["nas_retrain_unstructured"],
    "nas_retraining_structured": METHODS["nas_retrain_structured"],
    "full": METHODS["full"],
}


#: Models of the checks: two blocks, and one for what takes long to compile.
BOTH, ENCODER, BLOCK = ("encoder", "decoder"), ("encoder",), ("block",)


def small_encoder(width: int, layers: int) -> Any:
    config = small_bert(width)
    # The kind of problem is what the head writes into the config in its first call, and is compiled again for.
    config.num_hidden_layers, config.problem_type = layers, "single_label_classification"
    return config


def small_llama(width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )


@dataclass
class Run:
    """What the command line asks for."""

    device: torch.device
    small: bool

    def setting(self, kind: str, rank: int = 8) -> Setting:
        """Of a model of the checks ("encoder", "decoder", "block") or a timed one ("bert-large", "decoder-1b")."""
        timed = kind in ("bert-large", "decoder-1b")
        task = "CAUSAL_LM" if kind.startswith("decoder") else "SEQ_CLS"
        if timed and not self.small:
            found = SETTINGS["bert-large-16x128-r64" if task == "SEQ_CLS" else "decoder-1b-4x512-r64"]
            batch, tokens = (32, 128) if task == "SEQ_CLS" else (4, 1024)
            shape = {"batch": batch, "tokens": tokens, "rank": rank}
            return replace(found, name=f"{kind}-{batch}x{tokens}-r{rank}", rounds=10, **shape)
        width = 32 if self.small else 512
        return Setting(
            f"{kind}-r{rank}" if timed else kind,
            tokens=8 if self.small else 64,
            rank=rank,
            rounds=2,
            batch=2 if self.small else 8,
            config=partial(small_llama if task == "CAUSAL_LM" else small_encoder, width, 1 if kind == "block" else 2),
            task_type=task,
            dtype=torch.bfloat16 if timed else torch.float32,
        )

    @cached_property
    def models(self) -> dict[str, Workload]:
        """The checks' models, on the CPU."""
        return {kind: prepare(self.setting(kind), None, torch.device("cpu")) for kind in (*BOTH, *BLOCK)}


# -- a training of a few steps across a boundary ---------------------------------------------------------------------


class Training:
    """A fresh adapter on a copy of a model, that takes steps by hand.

    Args:
        weights: type of the base model's weights.
        autocast: type in which forward runs; None: without.
        scale: at which a GradScaler begins; None: without.
        fused: AdamW in its fused form.
        shard: wraps the model before the optimizer is made.
        compile_with: arguments of `torch.compile`; None: the model as it is.
    """

    def __init__(
        self,
        run: Run,
        kind: str,
        method: str,
        *,
        weights: torch.dtype = torch.float32,
        autocast: Optional[torch.dtype] = None,
        scale: Optional[float] = None,
        fused: bool = True,
        shard: Callable[[torch.nn.Module], object] = lambda model: None,
        compile_with: Optional[dict[str, Any]] = None,
    ) -> None:
        work, self.device, self.autocast = run.models[kind], run.device, autocast
        self.rows = {name: value.to(run.device) for name, value in work.rows.items()}
        torch.manual_seed(0)
        base: Any = copy.deepcopy(work.base).to(run.device, weights)
        self.model: Any = get_peft_model(base, ADAPTERS[method](str(work.setting.task_type))).train()
        shard(self.model)
        self.optimizer = torch.optim.AdamW(trained_parameters(self.model), lr=LR, fused=fused)
        self.scaler = torch.amp.GradScaler(run.device.type, init_scale=scale or 1.0, enabled=scale is not None)
        self.call = self.model if compile_with is None else torch.compile(self.model, **compile_with)
        self.done = 0
        self.tuner: Any = self.model.base_model
        if hasattr(self.tuner, "set_schedule"):
            self.tuner.set_schedule(total_steps=STEPS, optimizer=self.optimizer)

    @property
    def config(self) -> Any:
        return self.model.peft_config["default"]

    def step(self, spoil: bool = False) -> float:
        """One step, its gradients left; the loss. A step that the scaler skips does not count.

        Args:
            spoil: let gradients be infinite.
        """
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.call(**self.rows).loss
        self.scaler.scale(loss * float("inf") if spoil else loss).backward()
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= before:
            self.done += 1
            if hasattr(self.tuner, "update_and_allocate"):
                self.tuner.update_and_allocate(self.done)
        return float(loss.detach())

    def losses(self, until: int = STEPS) -> list[float]:
        """Take steps until so many are finished; their losses."""
        found: list[float] = []
        while self.done < until and len(found) < 2 * STEPS:  # a scaler may skip some
            found.append(self.step())
        return found

    def scores(self) -> list[torch.Tensor]:
        """NAS-LoRA's, on the CPU."""
        layers = (module for module in self.model.modules() if hasattr(module, "nas_lora_scores"))
        return [s.cpu() for layer in layers for own in layer.nas_lora_scores.values() for s in own.values()]


def whole_state(training: Training) -> dict[str, torch.Tensor]:
    """Everything in the model, copied to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in training.model.state_dict().items()}


def changed(training: Training, before: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of what has other bits than before."""
    return {name for name, value in whole_state(training).items() if not torch.equal(value, before[name])}


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def check_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> int:
    """The optimizer's state is that of what trains, in its shapes and on its device. Gives the number of entries."""
    trained = {id(parameter) for parameter in trained_parameters(model)}
    for parameter, state in optimizer.state.items():
        assert not state or id(parameter) in trained, f"State of {tuple(parameter.shape)} values that do not train."
        for name, value in state.items():
            assert name == "step" or value.shape == parameter.shape, f"{name}: {value.shape} for {parameter.shape}."
            assert name == "step" or value.device == parameter.device, f"{name} is on {value.device}."
    for parameter in model.parameters():
        assert parameter.requires_grad or parameter.grad is None, "A gradient of what does not train."
    return sum(bool(state) for state in optimizer.state.values())


def check_finite(losses: Iterable[float]) -> None:
    assert all(map(math.isfinite, losses)), f"The losses must be finite, got {losses}."


def largest_difference(own: Iterable[float], other: Iterable[float], at_most: float) -> float:
    """Largest relative difference of two series of losses."""
    pairs = list(zip(own, other, strict=True))
    found = max(abs(a - b) / abs(b) for a, b in pairs)
    assert found <= at_most, f"Losses must agree to {at_most}, got {found}: {pairs}."
    return found


# -- checks ----------------------------------------------------------------------------------------------------------


def across(run: Run, kind: str, method: str, **settings: Any) -> Numbers:
    """Across the boundary: losses are finite, what froze keeps its bits, what trains moves, state is of that alone."""
    training = Training(run, kind, method, **settings)
    losses = training.losses(BOUNDARY)
    entries, before = check_state(training.optimizer, training.model), whole_state(training)
    losses += training.losses()
    check_finite(losses)
    moved, trained = changed(training, before), trained_names(training.model)
    stray = moved - trained
    assert not stray, f"What does not train has moved: {sorted(stray)[:3]} of {len(stray)}."
    assert len(moved) > 0.9 * len(trained), f"Only {len(moved)} of {len(trained)} parameters have moved."
    check_state(training.optimizer, training.model)
    return {"losses": losses, "trained": len(trained), "moved": len(moved), "state_after_boundary": entries}


def bf16_autocast(run: Run, kind: str, method: str) -> Numbers:
    return across(run, kind, method, autocast=torch.bfloat16)


def bf16_weights(run: Run, kind: str, method: str) -> Numbers:
    return across(run, kind, method, weights=torch.bfloat16)


def fp16_scaler(run: Run, kind: str, method: str) -> Numbers:
    """fp16 with a GradScaler: a step that it skips, in either phase, moves nothing, counts nowhere and leaves no trace
    in scores."""
    training = Training(run, kind, method, autocast=torch.float16, scale=2.0**10)
    losses = []
    for finished in (1, BOUNDARY, BOUNDARY + 1):
        losses += training.losses(finished)
        before, scores = whole_state(training), training.scores()
        steps = [float(state["step"]) for state in training.optimizer.state.values() if state]
        training.step(spoil=True)
        assert training.done == finished, "The skipped step was counted."
        assert not changed(training, before), f"The skipped step moved {sorted(changed(training, before))[:3]}."
        assert steps == [float(s["step"]) for s in training.optimizer.state.values() if s][: len(steps)], "Steps grew."
        after = training.scores()
        assert len(scores) == len(after) and all(map(torch.equal, scores, after)), "The skipped step was scored."
    losses += training.losses()
    check_finite(losses)
    check_state(training.optimizer, training.model)
    return {"losses": losses, "scale": training.scaler.get_scale()}


def fused_adamw(run: Run, kind: str, method: str) -> Numbers:
    """Fused AdamW makes the steps that plain AdamW makes, has the same state right after the boundary, and NAS-LoRA's
    scores are unscaled."""
    plain, fused = (Training(run, kind, method, fused=own) for own in (False, True))
    losses = [each.losses(BOUNDARY) for each in (plain, fused)]
    states = [
        [(tuple(p.shape), float(s["step"])) for p, s in each.optimizer.state.items() if s] for each in (plain, fused)
    ]
    assert states[0] == states[1], "Right after the boundary the state is another."
    check_state(fused.optimizer, fused.model)
    for own, each in zip(losses, (plain, fused), strict=True):
        own += each.losses()
    numbers: Numbers = {"difference": largest_difference(losses[1], losses[0], 1e-4), "state": len(states[1])}
    if fused.config.peft_type == "NAS_LORA":
        given = [Training(run, kind, method, scale=scale) for scale in (None, 2.0**10)]
        for each in given:
            each.losses(BOUNDARY - 1)
        own, other = (torch.cat([s.flatten() for s in each.scores()]) for each in given)
        numbers["scores_difference"] = float((own - other).abs().max() / own.abs().max())
        assert numbers["scores_difference"] < 1e-3, f"Scores differ by {numbers['scores_difference']} with a scaler."
    return numbers


def memory(run: Run, kind: str, method: str) -> Numbers:
    """What the boundary gives back, with gradients there: counted by the adapter, by tensors, and by the allocator."""
    training = Training(run, kind, method)
    found: list[dict[str, float]] = []
    for finished in (BOUNDARY - 1, BOUNDARY, BOUNDARY + 1):
        training.losses(finished)
        tensors = [value for state in training.optimizer.state.values() for value in state.values()]
        tensors += [*training.model.parameters(), *training.model.buffers(), *training.scores()]
        tensors += [p.grad for p in training.model.parameters() if p.grad is not None]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        costs = training.tuner.costs_by_phase() if hasattr(training.tuner, "costs_by_phase") else []
        now = [cost.in_training for cost in costs if cost.phase == training.config.present_phase]
        found.append({"counted": sum(now), "tensors": sum(storages.values())})
        if run.device.type == "cuda":
            torch.cuda.synchronize()
            requested = torch.cuda.memory_stats().get("requested_bytes.all.current")
            found[-1] |= {"allocated": torch.cuda.memory_allocated(), "requested": requested}
    first, _, last = found
    freed = {key: first[key] - last[key] for key in first if first[key] is not None}
    steps = 4 * len(list(training.model.parameters()))  # the optimizer counts them in a tensor for each parameter
    # What the allocator was asked for, if it tells: its blocks are larger. Libraries hold some of it for themselves.
    asked = "requested" if "requested" in freed else "allocated"
    for key, room in {"tensors": steps, asked: steps + 0.02 * abs(freed["counted"]) + 2**16}.items():
        if key in freed:
            assert abs(freed[key] - freed["counted"]) <= room, f"{key} is to be as counted to {room}, got {freed}."
    return {"freed": freed, "before_at_and_after": found}


def fsdp2(run: Run, kind: str, method: str) -> Numbers:
    """`fully_shard` in a group of one process: the losses of the plain model, or a refusal before the first step."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = Training(run, kind, method).losses()
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if run.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh(run.device.type, (1,))

            def shard(model: torch.nn.Module) -> None:
                blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
                for module in (*blocks, model):
                    fully_shard(module, mesh=mesh)

            try:
                training = Training(run, kind, method, shard=shard)
            except (ScheduleError, ValueError) as error:
                return {"refused": str(error)}
            return {"difference": largest_difference(training.losses(), plain, 5e-5)}
        finally:
            dist.destroy_process_group()


def reloaded(run: Run, kind: str, method: str) -> Numbers:
    """An adapter that was trained and saved here gives the same logits on the CPU."""
    training = Training(run, kind, method)
    training.losses()
    work = run.models[kind]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        here = training.model.eval()(**training.rows).logits.cpu()
        training.model.save_pretrained(folder)
        there = PeftModel.from_pretrained(copy.deepcopy(work.base), folder, torch_device="cpu").eval()
        logits, fresh = there(**work.rows).logits, work.base.eval()(**work.rows).logits
    scale = float(logits.abs().max())
    numbers = {"difference": float((here - logits).abs().max()) / scale}
    numbers["moved"] = float((fresh - logits).abs().max()) / scale
    assert numbers["difference"] < 1e-4 < numbers["moved"], f"Logits must be the trained ones, got {numbers}."
    return numbers


def default_device(run: Run, kind: str, method: str) -> Numbers:
    """With a default device all is made where it belongs."""
    first = Training(run, kind, method).step()
    run.models  # noqa: B018, made on the CPU
    with torch.device(run.device):  # as set_default_device(), which torch 2.8 can't take back
        training = Training(run, kind, method)
        losses = training.losses()
    check_finite(losses)
    lost = {name for name, value in training.model.state_dict().items() if value.device.type != run.device.type}
    assert not lost, f"{sorted(lost)[:3]} are not on {run.device}."
    return {"difference": largest_difference(losses[:1], [first], 1e-4), "losses": losses}


def trainer(run: Run, kind: str, method: str) -> Numbers:
    """Trainer with PhaseCallback and the fused AdamW, in bf16 and, on a GPU, in fp16."""
    work, numbers = run.models[kind], {}
    data: Any = [{name: value[i] for name, value in work.rows.items()} for i in range(work.setting.batch)]
    for precision in ("bf16", "fp16") if run.device.type == "cuda" else ("bf16",):
        torch.manual_seed(0)
        model: Any = get_peft_model(copy.deepcopy(work.base), ADAPTERS[method](str(work.setting.task_type)))
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=work.setting.batch,
                learning_rate=LR,
                optim="adamw_torch_fused",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=run.device.type == "cpu",
                dataloader_pin_memory=False,
                **{precision: True},
            )
            made = Trainer(model, args, train_dataset=data, callbacks=[] if method == "lora" else [PhaseCallback()])
            made.remove_callback(PrinterCallback)
            made.train()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        check_finite(losses)
        assert len(losses) == STEPS, f"{STEPS} steps must be logged, got {len(losses)}."
        optimizer = raw_optimizer(made.optimizer)
        assert optimizer is not None and check_state(optimizer, model), "There is no optimizer's state."
        assert getattr(model.peft_config["default"], "phases_complete", True), "The boundary was not crossed."
        numbers[precision] = losses
    return numbers


def compiled(run: Run, kind: str, method: str, **settings: Any) -> Numbers:
    """`torch.compile` across the boundary: the losses of eager mode, and how often it compiles."""
    from torch._dynamo.utils import counters

    eager = Training(run, kind, method).losses()
    torch._dynamo.reset()
    counters.clear()
    settings = {"backend": "aot_eager" if run.small else "inductor", **settings}
    training = Training(run, kind, method, compile_with=settings)
    losses, graphs = [], []
    for _ in range(STEPS):
        if hasattr(torch.compiler, "cudagraph_mark_step_begin"):
            torch.compiler.cudagraph_mark_step_begin()
        losses.append(training.step())
        graphs.append(counters["stats"]["unique_graphs"])
    numbers = {
        "graphs_after_step": graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
        "cuda_graphs": {key: value for key, value in counters["inductor"].items() if "cudagraph" in str(key)},
        "losses": losses,
        "eager": eager,
    }
    torch._dynamo.reset()
    return {**numbers, "difference": largest_difference(losses, eager, 1e-3)}


def cuda_graphs(run: Run, kind: str, method: str) -> Numbers:
    return compiled(run, kind, method, backend="inductor", mode="reduce-overhead")


# -- step time and memory --------------------------------------------------------------------------------------------


def speed(run: Run, kind: str, rank: int) -> Numbers:
    """Step time and peak memory of all methods, which take their steps in turn, in bf16; ratios are to LoRA's."""
    own = run.setting(kind, rank)
    with torch.device(run.device):
        work = prepare(own, None, run.device)
    variants: dict[str, Variant] = {}
    rows: dict[str, Numbers] = {}
    for name, build in TIMED.items():
        start = time.perf_counter()
        try:
            variant = build(work)
            counted = measure_bytes(variant, work.rows)
            peak = peak_step_bytes(variant, work.rows)
        except Exception as error:  # no room, or not for this model: the others can be measured
            rows[name] = {"skipped": f"{type(error).__name__}: {error}"}
            free(run.device)
            continue
        variants[name] = variant
        rows[name] = {
            "settings": variant.settings,
            "trained_parameters": sum(parameter.numel() for parameter in trained_parameters(variant.model)),
            "bytes": counted,
            "peak_step_bytes": peak,
            "peak_bytes": None if peak is None else peak + counted["parameters"] + counted["optimizer"],
            "build_seconds": time.perf_counter() - start,
        }
    take_rounds(variants, work.rows, own.rounds)
    for name, variant in variants.items():
        rows[name] |= {
            "seconds": variant.seconds,
            "median_step": statistics.median(variant.seconds["step"]),
            "to": {
                peer: {"time": time_ratios(variant, variants[peer]), "peak": ratio_of(rows[name], rows[peer])}
                for peer in ("lora", "full")
                if peer in variants
            },
        }
    assert variants, f"No method could be built: {rows}."
    return {"setting": work.record(), "methods": rows}


def ratio_of(own: Numbers, other: Numbers) -> Optional[float]:
    return own["peak_bytes"] / other["peak_bytes"] if own["peak_bytes"] else None


class OneLayer(torch.nn.Module):
    """A frozen bf16 layer with a low-rank update, by one of the package's paths."""

    def __init__(self, path: Callable[..., torch.Tensor], width: int, rank: int, factors: torch.dtype) -> None:
        super().__init__()
        self.path = path
        self.register_buffer("weight", torch.randn(width, width, dtype=torch.bfloat16) / width**0.5)
        self.a = torch.nn.Parameter(torch.randn(rank, width, dtype=factors) / width**0.5)
        self.b = torch.nn.Parameter(torch.zeros(width, rank, dtype=factors))

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = input_ids.detach().requires_grad_()
        return SimpleNamespace(loss=self.path(x, self.weight, None, [(self.a, self.b, 1.0)]).float().mean())


def paths(run: Run, rank: int) -> Numbers:
    """What a bf16 layer takes by the separate path, as it does, with factors in float32 and in bf16, and by the
    effective weight: whether a fused form would pay. Beside them a frozen layer and LoRA's arithmetic."""

    def frozen(x: torch.Tensor, weight: torch.Tensor, bias: None, pairs: Any) -> torch.Tensor:
        return linear(x, weight) + 0 * pairs[0][1].sum()

    def lora(x: torch.Tensor, weight: torch.Tensor, bias: None, pairs: Any) -> torch.Tensor:
        ((a, b, factor),) = pairs
        return (linear(x, weight) + linear(linear(x.to(a.dtype), a), b) * factor).to(x.dtype)

    kinds = {
        "frozen": frozen,
        "lora": lora,
        "separate": separate_linear,
        "effective": effective_linear,
    }
    found: Numbers = {}
    for width in (64,) if run.small else (1024, 2048, 4096):
        rows = {"input_ids": torch.randn(16 if run.small else 4096, width, dtype=torch.bfloat16, device=run.device)}
        layers = {
            f"{name}_{str(dtype).removeprefix('torch.')}": OneLayer(path, width, rank, dtype).to(run.device)
            for name, path in kinds.items()
            for dtype in (torch.float32, torch.bfloat16)
            if dtype == torch.bfloat16 or name in ("lora", "separate")
        }
        variants = {name: Variant(each, torch.optim.SGD(each.parameters(), lr=0.0)) for name, each in layers.items()}
        take_rounds(variants, rows, 3 if run.small else 30)
        found[str(width)] = {n: quartiles(v.seconds["forward_backward"]) for n, v in variants.items()}
    return found


# -- jobs and records ------------------------------------------------------------------------------------------------

#: Checks of a small model with each adapter: the models, and whether a GPU is needed.
CHECKS: dict[str, tuple[Callable[..., Numbers], tuple[str, ...], bool]] = {
    "bf16_autocast": (bf16_autocast, BOTH, False),
    "bf16_weights": (bf16_weights, BOTH, False),
    "fp16_scaler": (fp16_scaler, BOTH, False),
    "fused_adamw": (fused_adamw, BOTH, False),
    "memory": (memory, BOTH, False),
    "reloaded": (reloaded, BOTH, False),
    "default_device": (default_device, BOTH, True),
    "trainer": (trainer, ENCODER, False),
}
#: Those that take long, or may hang.
LAST_CHECKS = {
    "fsdp2": (fsdp2, BOTH, False),
    "compiled": (compiled, BLOCK, False),
    "cuda_graphs": (cuda_graphs, BLOCK, True),
}
RANKS = (16, 64)
PARTS = (*CHECKS, "speed", "paths", *LAST_CHECKS)


def jobs(run: Run, only: Iterable[str] = PARTS, methods: Iterable[str] = tuple(ADAPTERS)) -> dict[str, Any]:
    """`{name of the record: what gives its numbers, or a sentence why it can't}`, in the order in which they run."""

    def of(checks: Mapping[str, tuple[Callable[..., Numbers], tuple[str, ...], bool]]) -> Iterator[tuple[str, Any]]:
        for name, (check, kinds, needs_gpu) in checks.items():
            able = run.device.type == "cuda" or not needs_gpu
            for kind in kinds[:1] if run.small else kinds:
                for method in methods:
                    yield f"{name}-{kind}-{method}", partial(check, run, kind, method) if able else "needs a GPU"

    found = dict(of(CHECKS))
    for kind in ("bert-large", "decoder-1b"):
        found |= {f"speed-{kind}-r{rank}": partial(speed, run, kind, rank) for rank in RANKS}
    found |= {f"paths-r{rank}": partial(paths, run, rank) for rank in RANKS}
    found |= dict(of(LAST_CHECKS))
    return {name: job for name, job in found.items() if name.split("-")[0] in only}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def do(job: Any, seconds: float) -> dict[str, Any]:
    """A record's own part: whether the job passed, and its numbers, the exception, or why it was skipped.

    Args:
        seconds: that are left.
    """
    if isinstance(job, str) or seconds <= 0:
        return {"passed": None, "skipped": job if isinstance(job, str) else "the time was over"}
    start = time.perf_counter()
    try:
        with at_most(min(seconds, MOST_SECONDS)):
            found = {"passed": True, "numbers": job()}
    except Exception as error:
        sentence, trace = f"{type(error).__name__}: {error}", traceback.format_exc()  # a compiler's are of many pages
        found = {"passed": False, "error": sentence[:2000], "traceback": trace[-4000:]}
    return {**found, "seconds": time.perf_counter() - start}


def free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()  # models and their drivers point at each other
        torch.cuda.empty_cache()


def is_lost(device: torch.device) -> bool:
    """Whether a failure has left the GPU unusable for this process."""
    try:
        return bool(torch.ones(1, device=device).isnan().item())
    except RuntimeError:
        return True


def main(argv: Optional[list[str]] = None) -> int:
    """Run the script; 1 if a check did not pass."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of the whole (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--methods", nargs="+", choices=ADAPTERS, default=tuple(ADAPTERS), help="of the checks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the records (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="leave records as they are that are there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda must find a GPU, and torch sees none. Without one: --device cpu --small")
    end = time.monotonic() + 60 * args.minutes
    # What hangs in a library is not interrupted otherwise.
    faulthandler.dump_traceback_later(60 * args.minutes + 15, exit=True, file=sys.__stderr__)
    run = Run(torch.device(args.device), args.small)
    device = run_record.device_record(SimpleNamespace(device=run.device, world_size=1))
    common = {"device": device, "versions": run_record.versions(), "code": run_record.code(), "small": args.small}
    failed = []
    for name, job in jobs(run, args.only, args.methods).items():
        path = args.out / f"{name}.json"
        if args.resume and path.is_file():
            continue
        record = {"name": name, **do(job, end - time.monotonic()), **common, "date": run_record.now()}
        run_record.write_json(path, record)
        verdict = {True: "passed", False: "FAILED", None: "skipped"}[record["passed"]]
        print(f"{verdict} {name} {record.get('error', record.get('skipped', ''))}"[:300], flush=True)
        failed += [name] if record["passed"] is False else []
        if record["passed"] is False and is_lost(run.device):
            left = (end - time.monotonic()) / 60
            words = [*argv, "--resume", "--minutes", f"{left:.3f}"]
            os.execv(sys.executable, [sys.executable, "-m", "scripts.bench.gpu", *words])
        free(run.device)
    faulthandler.cancel_dump_traceback_later()
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "none failed", f"-> {args.out}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    gc.freeze()  # what is imported is not looked through again after each check
    sys.exit(main())
