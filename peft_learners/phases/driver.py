"""The driver of phases: it lays an adapter's phases over a training and moves the model from one to the next.

It needs a model with injected adapters and nothing else, so it serves `PeftModel`, transformers' own `add_adapter`,
Trainer (through `PhaseCallback`) and a hand-written loop alike. `PhaseDriver._move_to` is what happens at a boundary,
from top to bottom: the tuner's own change of its layers, the freeze, the record in the adapter's config, optimizer
state, DDP, the line in the log. The optimizer and DDP's wrapper are those that were handed over.
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..config import PhasedConfig
from ..layers.base import adapter_parameters, tuner_layers
from ..layers.value import Value
from ..registry import tuner_of
from ..structure.weights import shape_of
from .ddp import (
    Ranks,
    all_ranks,
    ddp_modules,
    holds,
    is_first_process,
    processes,
    ranks_of,
    rebuild_reducer,
    unwrapped,
)
from .optimizer import GroupState, Observer, before_each_step, is_deepspeeds, is_offloaded, raw_optimizer, state_bytes
from .report import in_units
from .schedule import Phase, Schedule, ScheduleError
from .shards import is_sharded

logger = logging.getLogger("peft_learners")
_ATTRIBUTE = "_peft_learners_driver"
#: How an adapter comes into a phase: in a training that begins there, in one that goes on there, across a boundary.
Entry = Literal["new", "resumed", "crossed"]


@dataclass(frozen=True)
class PhaseStart:
    """One adapter's entry into a phase.

    Attributes:
        adapter: the adapter's name.
        phase: the phase's name.
        first_step: finished optimizer steps at which it begins.
        trained_before: trained parameters of the whole model before the boundary.
        trained_after: the same after the boundary.
        begins_anew: whether a training of its own begins (see `Phase`), and not the run's first.
        step: finished optimizer steps at the entry: more than `first_step` where a resumed run goes on in the phase.
        optimizer_before, optimizer_after: bytes of this process's optimizer state, before and after; None without an
            optimizer.
        facts: what else there is to say of the boundary: the energy that a fold kept, that parameters changed.
    """

    adapter: str
    phase: str
    first_step: int
    trained_before: int
    trained_after: int
    begins_anew: bool = False
    step: int = 0
    optimizer_before: int | None = None
    optimizer_after: int | None = None
    facts: str = ""

    def __str__(self) -> str:
        verb = "begins" if self.step <= self.first_step else "goes on"
        line = f"step {self.step}, adapter {self.adapter!r}: phase {self.phase!r} {verb}; trained parameters "
        line += _change(f"{self.trained_before:,}", f"{self.trained_after:,}")
        if self.optimizer_before is not None and self.optimizer_after is not None and self.optimizer_before:
            line += f"; optimizer state {_change(in_units(self.optimizer_before), in_units(self.optimizer_after))}"
        return f"{line}; {self.facts}" if self.facts else line


def _change(before: str, after: str) -> str:
    return f"{before} -> {after}" if before != after else after


@dataclass(frozen=True)
class Training:
    """A training as a tuner sees it at a boundary: where it stands, and what was handed over.

    Attributes:
        global_step: finished optimizer steps.
        optimizer: torch's own, behind any wrapper; None if there is none.
        ranks: the processes that must choose the same, if there are several.
        observer: what has watched the optimizer's steps for the adapter in the phase that ends.
    """

    global_step: int
    optimizer: torch.optim.Optimizer | None
    ranks: Ranks | None
    observer: Observer | None = None


def injected_model(model: nn.Module) -> nn.Module:
    """The original model that holds the tuner layers: behind wrappers, `PeftModel` and the tuner, or, where the model
    itself has no adapter, the one part of it that has (a user's own module around an encoder)."""
    model = unwrapped(model)
    base = getattr(model, "base_model", None)
    tuner = base if isinstance(base, nn.Module) and hasattr(type(base), "update_and_allocate") else model
    root = cast(nn.Module, tuner.model) if hasattr(type(tuner), "update_and_allocate") else tuner
    if "peft_config" not in vars(root):
        parts = [m for m in root.modules() if "peft_config" in vars(m) and not hasattr(type(m), "update_and_allocate")]
        root = parts[0] if len(parts) == 1 else root
    return root


def constant_buffers(root: nn.Module) -> Iterator[torch.Tensor]:
    """What the tuner layers hold beside parameters: frozen values and positions, which only boundaries change."""
    for layer in tuner_layers(root):
        for name in layer.other_param_names:
            values = getattr(layer, name)
            yield from values.values() if isinstance(values, BufferDict) else ()
        for part in layer.adapter_layer_names:
            yield from getattr(layer, part).buffers()


def trained_parameters(root: nn.Module) -> int:
    """Number of parameters that require a gradient; shared ones once."""
    return sum(shape_of(parameter).numel() for parameter in root.parameters() if parameter.requires_grad)


class PhaseDriver:
    """Drives the phases of all active, trained adapters of one model. One per model: use `PhaseDriver.of`."""

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self.schedules: dict[str, Schedule] = {}
        self.total_steps: int | None = None
        self.global_step = 0
        self._phase: dict[str, Phase] = {}
        self._marks: list[tuple[int, str, int]] = []
        #: Not held on to: whoever trains with it does.
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._ddp: list[DistributedDataParallel] = []
        #: Whether a training is under way (started, and neither finished nor at its last step).
        self.running = False
        #: Whether an optimizer is yet to be made that holds all that ever trains.
        self.prepared = False
        self._ends_by_itself = True
        self._log = True
        #: Whether anybody has said, since the start, that a step is finished.
        self._updated = False
        self._observing: dict[str, tuple[Observer, RemovableHandle]] = {}
        self._groups: GroupState | None = None
        #: Adapters that stop at their next boundary, since an engine can't cross it, and what to tell once they have.
        self._stopping: set[str] = set()
        self.stopped: list[str] = []
        #: Models that were copied from this one.
        self._copies: list[weakref.ref[nn.Module]] = []

    @classmethod
    def of(cls, model: nn.Module) -> PhaseDriver:
        """The driver of a model (`PeftModel`, tuner, wrapped or bare), made on first use."""
        root = injected_model(model)
        driver = root.__dict__.get(_ATTRIBUTE)
        if driver is None:  # in a copied model, too
            driver = root.__dict__[_ATTRIBUTE] = cls(root)
        return driver

    @classmethod
    def find(cls, model: nn.Module) -> PhaseDriver | None:
        """The driver of a model if it has one already."""
        return injected_model(model).__dict__.get(_ATTRIBUTE)

    @staticmethod
    def forget(root: nn.Module, adapter: str | None = None) -> None:
        """Leave no trace on a model whose adapters were taken out, or of the one that was."""
        driver = root.__dict__.get(_ATTRIBUTE)
        if driver is not None and adapter is not None:
            for record in (driver.schedules, driver._phase):
                record.pop(adapter, None)
            driver._observe(adapter, None)
        if driver is None or adapter is None or not driver.schedules:
            if driver is not None:
                driver._stop_observing()
            root.__dict__.pop(_ATTRIBUTE, None)  # in a copied model there is a None

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        root = self._root()
        made = memo.get(id(root)) if root is not None else None
        self._copies += [weakref.ref(made)] if isinstance(made, nn.Module) else []
        return None  # a copied model starts without a driver

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    # -- what there is to drive -------------------------------------------------------------------------------------

    @property
    def root(self) -> nn.Module:
        root = self._root()
        if root is None:
            raise RuntimeError("The model of this phase driver no longer exists.")
        return root

    def _values(self) -> Iterator[Value]:
        """What all adapters have in tuner layers that can freeze."""
        for layer in tuner_layers(self.root):
            for part in layer.adapter_layer_names:
                yield from (value for value in getattr(layer, part).values() if isinstance(value, Value))

    def configs(self) -> dict[str, PhasedConfig]:
        """Configs of the phased adapters that are active and trained."""
        first = next(tuner_layers(self.root), None)
        active = first.active_adapters if first is not None else ()
        return {
            name: config
            for name, config in getattr(self.root, "peft_config", {}).items()
            if isinstance(config, PhasedConfig) and name in active and not config.inference_mode
        }

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that was handed over last, behind any wrapper, if it is still there."""
        return self._optimizer() if self._optimizer is not None else None

    def last_step(self) -> tuple[str, int] | None:
        """Phase and number of trained parameters of the step that finished last ("a+b" where adapters differ in their
        phase); before any step, those of the first one. None before a start."""
        past = [mark for mark in self._marks if mark[0] < self.global_step] or self._marks[:1]
        return past[-1][1:] if past else None

    def first_steps(self) -> dict[str, dict[str, int]]:
        """`{adapter: {phase: first step}}` of the schedules in force; what a checkpoint should keep."""
        return {name: schedule.first_steps for name, schedule in self.schedules.items()}

    def fresh_starts(self) -> list[int]:
        """First steps of the phases that begin anew, the first phase among them; [0] if there are none."""
        steps = {p.first_step for schedule in self.schedules.values() for p in schedule.phases if p.begins_anew}
        return sorted(steps | {0})

    # -- verbs ------------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        global_step: int = 0,
        first_steps: Mapping[str, Mapping[str, int]] | None = None,
        optimizer: object = None,
        wrappers: Sequence[nn.Module] = (),
        ends_by_itself: bool = True,
        stops: bool = False,
        log: bool = True,
    ) -> list[PhaseStart]:
        """Lay the phases over a training that is about to begin or to be resumed.

        Args and Raises as for `PhasedModel.set_schedule`, but:
            first_steps: recorded boundaries of a resumed run, which stay whatever has been changed since. None: those
                in the adapters' configs, where `global_step` is above 0.
            wrappers: what forward is called on; the DDP modules in it are rebuilt at boundaries.
            ends_by_itself: whether training is over at `total_steps`; False: only `finish()` ends it.
            stops: whether training ends at the next boundary. One that an engine can't cross is left to the next
                training then.
            log: whether each phase that begins is a line in the log; False: whoever drives tells the user.
        """
        schedules, configs, raw = {}, self.configs(), raw_optimizer(optimizer)
        engines = {name: self._engine_in_the_way(name, config, optimizer) for name, config in configs.items()}
        for name, config in configs.items():
            if config.next_phase is not None and engines[name] is not None:
                raise ScheduleError(_too_late(name, config.next_phase, engines[name]))
        self._tell(self.enter_next_phases())
        for name, config in configs.items():
            recorded = (first_steps or {}).get(name)
            if recorded is None and global_step > 0:
                recorded = config.phase_first_steps
            tuner = tuner_of(config)
            if recorded:
                schedule = config.outline().with_first_steps(recorded)
            elif config.phases_complete:
                schedule = config.outline().last_only()
                self._warn_if_only_said_to_be_complete(tuner, name, config)
            elif global_step > 0:
                schedule = config.whole_schedule(total_steps, steps_per_epoch)
            else:
                schedule = config.schedule(total_steps, steps_per_epoch)
            self._refuse_merged(name)
            tuner.check_phases(self.root, name, config, schedule)
            engine, now = engines[name], schedule.phase_at(global_step)
            if engine is not None:
                self._check_engine(name, engine, config, schedule, now, stops)
            if now is not schedule.phases[-1]:
                if tuner.reads_gradients and is_offloaded(optimizer):
                    raise ScheduleError(
                        f"The adapter {name!r} can't be searched: DeepSpeed has offloaded the optimizer, and with it "
                        "the gradients that units are scored by. Leave `offload_optimizer` out of the search; the "
                        "retraining may have it."
                    )
                if not is_deepspeeds(optimizer):  # which holds flat tensors
                    self._check_optimizer(name, tuner.why_optimizer(config), now, raw)
                    if raw is not None and global_step == 0:
                        tuner.check_learning_rate(name, config, schedule, raw)
            schedules[name] = schedule
        self._check_wrappers(wrappers)
        self._stop_observing()
        self.prepared = False
        self.schedules, self.total_steps, self._phase, self._marks = schedules, total_steps, {}, []
        self._optimizer = weakref.ref(raw) if raw is not None else None
        anew = any(phase.begins_anew for schedule in schedules.values() for phase in schedule.phases)
        self._groups = GroupState(raw, resumed=global_step > 0) if raw is not None and anew else None
        self._ddp = ddp_modules(self.root, wrappers)
        self._stopping, self.stopped = {name for name, engine in engines.items() if engine is not None}, []
        self.running, self._ends_by_itself, self._updated = True, ends_by_itself, False
        self._log = log
        for name, schedule in schedules.items():
            configs[name].write("phase_first_steps", schedule.first_steps)
        starts = self._move_to(global_step, "new" if global_step == 0 else "resumed")
        for value in self._values():
            value.forget_loaded()
        return starts

    def update(self, global_step: int) -> list[PhaseStart]:
        """To be called between two optimizer steps: crosses the boundary if one lies at `global_step` finished steps.

        Args:
            global_step: optimizer steps that are finished.

        Raises:
            ScheduleError: no schedule was set, and an adapter has phases before it; or the steps go backwards.
        """
        starts = [] if self.schedules else self._start_without_schedule()
        if global_step < self.global_step:
            raise ScheduleError(
                f"update_and_allocate({global_step}) came after update_and_allocate({self.global_step}), but finished "
                "steps only grow. For a new training call model.base_model.set_schedule(...) first."
            )
        self._updated = True
        if self._stop_at(global_step):
            return starts
        return starts + self._move_to(global_step)

    def _stop_at(self, global_step: int) -> bool:
        """Leave a boundary to the next training, if one lies here that an engine can't cross."""
        if not self._stopping:
            return False
        ahead = {name: schedule.phase_at(global_step) for name, schedule in self.schedules.items()}
        ahead = {name: phase for name, phase in ahead.items() if phase is not self._phase[name]}
        if not self._stopping & {*ahead}:
            return False
        if self.stopped:
            raise ScheduleError(
                f"The training was to end at step {self.global_step}, where an engine can't cross the boundary of the "
                f"adapter {next(iter(ahead))!r}, but step {global_step} is finished. Save the adapter there, and let "
                "another training go on."
            )
        for name, phase in ahead.items():
            self.root.peft_config[name].write("next_phase", phase.name)  # type: ignore[union-attr, index]
            self.stopped.append(
                f"step {global_step}, adapter {name!r}: phase {self._phase[name].name!r} ends; {phase.name!r} begins "
                "with the next training of what is saved now"
            )
        self._tell(self.stopped)
        self.global_step = global_step
        self.collect()
        return True

    @property
    def leaves_boundary(self) -> bool:
        """Whether a boundary ahead is left to the next training, since an engine can't cross it."""
        ahead = {n for n, schedule in self.schedules.items() if self._phase.get(n) is not schedule.phases[-1]}
        return bool(self._stopping & ahead)

    def collect(self) -> None:
        """Bring together, before a save, what an engine's processes have gathered. To be called by all of them."""
        for observer, _ in self._observing.values():
            observer.collect()

    def enter_next_phases(self) -> list[PhaseStart]:
        """Cross the boundaries that the last training has stopped at, before an engine takes hold of parameters."""
        ahead = {name: config for name, config in self.configs().items() if config.next_phase is not None}
        for name in ahead:
            self._refuse_merged(name)
        starts = []
        for name, config in ahead.items():
            phases, tuner = config.outline().phases, tuner_of(config)
            index = config.phase_names.index(str(config.next_phase))
            if config.init_weights and not tuner.has_trained(self.root, name, config):
                config.write("next_phase", None)  # the config of another adapter, that had been trained
                continue
            before = trained_parameters(self.root)
            tuner.check_trained(self.root, name, config, phases[index - 1])
            tuner.enter_phase(self.root, name, config, phases[index], "crossed", Training(0, None, all_ranks()))
            self.freeze_for(name, phases[index])
            config.write("completed_phases", config.phase_names[:index])
            config.write("next_phase", None)
            config.write("phase_first_steps", None)  # those of the training that is over
            after = trained_parameters(self.root)
            facts = ["this is a training of its own: train() without resume_from_checkpoint", config.boundary_facts()]
            starts.append(PhaseStart(name, phases[index].name, 0, before, after, facts="; ".join(filter(None, facts))))
        return starts

    def _tell(self, lines: Sequence[object]) -> None:
        if self._log and is_first_process():
            for line in lines:
                logger.info("%s", line)

    def go_back_to(self, global_step: int) -> list[PhaseStart]:
        """The model has been given the weights of an earlier step (the best checkpoint): so is the record."""
        return self._move_to(global_step, "resumed")

    def prepare(self) -> None:
        """Before an optimizer is made that is to load the state of any step of a run: all that ever trains does."""
        self._tell(self.enter_next_phases())
        self.prepared = True
        for name, config in self.configs().items():
            tuner_of(config).make_whole(self.root, name, config)
            self.freeze_for(name, None)

    def hold_frozen(self) -> None:
        """Before FSDP wraps the model, which shards parameters and no buffers: frozen values are parameters there."""
        for value in self._values():
            value.hold()
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true" and any(
            True for _ in constant_buffers(self.root)
        ):
            raise ScheduleError(
                "fsdp_cpu_ram_efficient_loading=true can't load buffers, and a FAR or NAS-LoRA adapter behind its "
                "boundary has some. Set it to false in the config file. Where none is set, `accelerate launch` "
                "takes true."
            )

    def finish(self) -> None:
        """Training is over: saved adapters may be cast from now on, and nothing watches the optimizer any more."""
        self.running = False
        self.schedules, self._phase, self.global_step, self._ddp, self._stopping = {}, {}, 0, [], set()
        self._stop_observing()

    def restart(self, names: Collection[str] | None = None) -> None:
        """Begin all phases again with the next training: nothing is frozen, no phase is complete.

        Args:
            names: adapters; None: all that are active and trained.
        """
        self.schedules, self._phase = {}, {}
        for name, config in self.configs().items():
            if names is not None and name not in names:
                continue
            config.write("completed_phases", [])
            config.write("phase_first_steps", None)
            config.write("next_phase", None)
            tuner_of(config).restart(self.root, name, config, self.optimizer)
            self.freeze_for(name, None)

    def freeze_for(self, adapter: str, phase: Phase | None) -> list[nn.Parameter]:
        """Freeze what `phase` does not train of an adapter, and let go of what is empty (None: neither). Returns what
        stopped training by it."""
        stopped: list[nn.Parameter] = []
        for layer in tuner_layers(self.root):
            stopped += layer.freeze_parts(adapter, phase.freezes if phase is not None else ())
            stopped += layer.drop_empty(adapter) if phase is not None else []
        return stopped

    def _warn_if_only_said_to_be_complete(self, tuner: Any, name: str, config: PhasedConfig) -> None:
        source = getattr(config, "cloned_from", None)
        if source is not None:
            warnings.warn(
                f"The adapter {name!r} was added with the config of {source!r}, as a clone of it, and trains in its "
                f"phase {config.outline().phases[-1].name!r} alone. For a fresh adapter give it a config of its own, "
                "or call model.base_model.restart_phases().",
                stacklevel=3,
            )
            return
        if config.completed_phases and config.init_weights and not tuner.has_trained(self.root, name, config):
            warnings.warn(
                f"The config of the adapter {name!r} says that {', '.join(config.completed_phases)} is complete, but "
                "the adapter has nothing of it: was the config taken from another, trained adapter? Call "
                "model.base_model.restart_phases() to go through all phases.",
                stacklevel=3,
            )

    def _start_without_schedule(self) -> list[PhaseStart]:
        for name, config in self.configs().items():
            if config.phases_complete:
                continue
            try:
                config.schedule(None, None)
            except ScheduleError as error:
                raise ScheduleError(
                    f"update_and_allocate() was called before the adapter {name!r} had a schedule. {error} Or call "
                    "model.base_model.set_schedule(total_steps=..., steps_per_epoch=...) before the loop."
                ) from None
        return self.start()

    def _refuse_merged(self, name: str) -> None:
        if any(name in layer.merged_adapters for layer in tuner_layers(self.root)):
            raise ScheduleError(f"The adapter {name!r} is merged and can't train: call unmerge_adapter() first.")

    def _engine_in_the_way(self, name: str, config: PhasedConfig, optimizer: object) -> str | None:
        """What can't follow an adapter across a boundary that gives parameters other shapes or values."""
        if not tuner_of(config).reshapes(config):
            return None
        if is_deepspeeds(optimizer):
            return "DeepSpeed"
        values = [value for layer in tuner_layers(self.root) for _, value in layer.parts_of(name)]
        if any(map(is_sharded, values)):
            return "FSDP1" if any(hasattr(value, "_fsdp_flattened") for value in values) else "FSDP"
        return "LBFGS" if isinstance(raw_optimizer(optimizer), torch.optim.LBFGS) else None

    def _check_engine(
        self, name: str, engine: str, config: PhasedConfig, schedule: Schedule, now: Phase, stops: bool
    ) -> None:
        """Refuse what an engine can't do, before the first step, with what it can.

        Raises:
            ScheduleError: the adapter has been prepared for another phase, or has a boundary ahead and would not stop.
        """
        if now.name != config.present_phase and not config.phases_complete:
            raise ScheduleError(_too_late(name, now.name, engine))
        if now is schedule.phases[-1]:
            return
        if engine == "FSDP1":
            raise ScheduleError(
                f"The adapter {name!r} changes the shapes of its parameters at a boundary, and FSDP1 shows parts of "
                "them alone. Take FSDP2: fsdp_version: 2."
            )
        if stops:
            return
        why = {
            "DeepSpeed": "it keeps flat copies of all that trained when it was set up",
            "FSDP": "it holds parameters in shards, whose shapes can't change",
            "LBFGS": "it keeps flat copies of all parameters",
        }
        phases = ", ".join(phase.name for phase in schedule.phases)
        raise ScheduleError(
            f"The adapter {name!r} goes through phases ({phases}), which {engine} can't follow in one run: "
            f"{why[engine]}. Train in two: PhaseCallback(stop_at_boundary=True) ends this run at the boundary. Then "
            f"train on with the adapter that it saved: model = {_LOAD}."
        )

    def _check_optimizer(self, name: str, needs: str, phase: Phase, optimizer: torch.optim.Optimizer | None) -> None:
        """Tell the user when an adapter with a boundary ahead has no optimizer, or one that does not train it.

        Args:
            needs: why its tuner can't do without; "" where it can.
            phase: the one that training begins in.
        """
        if optimizer is None and needs:
            raise ScheduleError(
                f"The adapter {name!r} {needs}: hand it over, model.base_model.set_schedule(..., optimizer=optimizer)."
            )
        if optimizer is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own = [
            parameter
            for layer in tuner_layers(self.root)
            for part, parameter in layer.parts_of(name)
            if part not in phase.freezes and parameter.requires_grad and parameter.numel()
        ]
        lost = sum(id(parameter) not in held for parameter in own)
        if lost:
            message = (
                f"The optimizer that was handed over holds {len(own) - lost} of the {len(own)} parameters of the "
                f"adapter {name!r} that train now. Make it from [p for p in model.parameters() if p.requires_grad], "
                "after the adapter has been added, loaded or restarted."
            )
            if needs:
                raise ScheduleError(message)
            warnings.warn(message, stacklevel=4)

    def _warn_of_copies(self, starts: list[PhaseStart]) -> None:
        """An average of weights (an EMA) that was copied from the model still has the parameters of the last phase."""
        if any(made() is not None for made in self._copies):
            warnings.warn(
                f"The adapter {starts[0].adapter!r} enters the phase {starts[0].phase!r} with other parameters than "
                "before, and a copy of the model is alive. If it is an average of weights (AveragedModel, an EMA), "
                "make it anew from the model now, or train phase by phase: PhaseCallback(stop_at_boundary=True). A "
                "frozen reference model may stay.",
                stacklevel=4,
            )
            self._copies = []

    def _check_wrappers(self, wrappers: Sequence[nn.Module]) -> None:
        count = processes() or 1
        if count > 1 and not any(holds(wrapper, self.root) for wrapper in wrappers):
            raise ScheduleError(
                f"{count} processes train together, but the wrapper of the model was not handed over. Pass the model "
                "as DistributedDataParallel or accelerator.prepare returned it: "
                "model.base_model.set_schedule(..., wrapper=model)."
            )

    def _observe(self, name: str, observer: Observer | None) -> None:
        """Call an adapter's observer before each step of the optimizer from now on, in place of the one before."""
        if name in self._observing:
            self._observing.pop(name)[1].remove()
        if observer is not None and self.optimizer is not None:
            self._observing[name] = observer, before_each_step(self.optimizer, observer)

    def _stop_observing(self) -> None:
        for _, handle in self._observing.values():
            handle.remove()
        self._observing = {}

    def _move_to(self, global_step: int, entry: Entry = "crossed") -> list[PhaseStart]:
        """Let each adapter enter the phase that owns the next step, if it is not there: here a boundary is crossed."""
        self.global_step = global_step
        if self._ends_by_itself and self.total_steps is not None and global_step >= self.total_steps:
            self.running = False
            self._stop_observing()
        configs = getattr(self.root, "peft_config", {})
        self.schedules = {name: schedule for name, schedule in self.schedules.items() if name in configs}
        entering = {
            name: schedule.phase_at(global_step)
            for name, schedule in self.schedules.items()
            if schedule.phase_at(global_step) is not self._phase.get(name)
        }
        if not entering:
            return []
        root, optimizer = self.root, self.optimizer
        for name in entering:
            self._refuse_merged(name)
        before, bytes_before = trained_parameters(root), state_bytes(optimizer)
        stopped: list[nn.Parameter] = []
        for name, phase in entering.items():
            tuner, config, schedule = tuner_of(configs[name]), configs[name], self.schedules[name]
            if name in self._phase:
                tuner.check_trained(root, name, config, self._phase[name])
            observer = self._observing[name][0] if name in self._observing else None
            training = Training(global_step, optimizer, ranks_of(self._ddp), observer)
            tuner.enter_phase(root, name, config, phase, entry, training)
            stopped += self.freeze_for(name, phase)
            if phase.begins_anew and entry == "crossed":
                stopped += adapter_parameters(root, name)
                if optimizer is not None and self._groups is not None:
                    self._groups.reset(optimizer)
            self._phase[name] = phase
            self._observe(name, tuner.observer(root, name, config, phase) if self.running else None)
            if len(schedule.phases) > 1:
                config.write("completed_phases", schedule.completed(global_step))
        if optimizer is not None:
            # What stopped training stays in its groups, with `grad = None`, which optimizers skip (weight decay too):
            # taking it out would make a later resume fail on the size of the groups, and break LambdaLR.
            for parameter in stopped:
                optimizer.state.pop(parameter, None)
        # At every start too: what trains may have changed since DDP was built (restart_phases, set_adapter).
        for ddp in self._ddp:
            rebuild_reducer(ddp, constant_buffers(root))
        after, bytes_after = trained_parameters(root), state_bytes(optimizer)
        self._marks.append((global_step, "+".join(sorted({p.name for p in self._phase.values()})), after))
        anew = entry == "crossed"
        starts = [
            PhaseStart(
                name, phase.name, phase.first_step, before, after, anew and phase.begins_anew, global_step,
                bytes_before, bytes_after, _facts(configs[name]) if anew else "",
            )
            for name, phase in entering.items()
        ]  # fmt: skip
        self._tell(starts)
        if anew:
            self._warn_of_copies(starts)
        return starts


def _facts(config: Any) -> str:
    """What else there is to say of a boundary."""
    stale = "copies of parameters kept elsewhere (an EMA) are stale" if tuner_of(config).reshapes(config) else ""
    return "; ".join(filter(None, (config.boundary_facts(), stale)))


_LOAD = 'PeftModel.from_pretrained(base_model, "<output_dir>/checkpoint-<step>", is_trainable=True)'


def _too_late(adapter: str, phase: str, engine: str | None) -> str:
    """Sentence of an error."""
    return (
        f"The adapter {adapter!r} stands before its phase {phase!r}, and {engine} holds its parameters already. Load "
        f"it from its checkpoint, {_LOAD}, and let its phase begin before the engine does: "
        "Trainer(..., callbacks=[PhaseCallback()]), or in a loop model.base_model.prepare_optimizer()."
    )


def warn_if_never_driven(model: nn.Module, adapter: str, config: PhasedConfig, verb: str) -> None:
    """Tell the user at save or merge when an adapter was trained without its phases being driven."""
    if config.inference_mode or config.phases_complete:
        return
    driver = PhaseDriver.find(model)
    if driver is not None and adapter in driver.schedules:
        driven = driver._updated
    else:
        driven = config.phase_first_steps is not None
    if driven or not tuner_of(config).has_trained(model, adapter, config):
        return
    warnings.warn(
        f"The adapter {adapter!r} is about to be {verb}, but its phases were never driven: everything it has trained "
        "until the end, and nothing was frozen. Pass callbacks=[PhaseCallback()] to Trainer, or call "
        "model.base_model.set_schedule(...) before your loop and model.base_model.update_and_allocate(global_step) "
        "after each optimizer.step().",
        stacklevel=2,
    )
