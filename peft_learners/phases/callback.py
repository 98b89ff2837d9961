"""Trainer's events, handed to the phase driver. No algorithm lives here."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from ..config import PhasedConfig
from ..hub.short_card import warn_of_local_base
from .ddp import search_ddp_wrappers
from .driver import PhaseDriver, PhaseStart
from .lr_schedule import restart_schedule
from .report import tell
from .schedule import ScheduleError
from .whole_checkpoints import Record, record_of, refuse_half_loaded, warn_if_fresh, warn_if_half_written


class PhaseCallback(TrainerCallback, ExportableState):
    """Drives the phases of an adapter under `Trainer`: `Trainer(model, args, ..., callbacks=[PhaseCallback()])`.

    At a boundary, between two optimizer steps, what the next phase does not train freezes, its gradients and
    optimizer state are freed, and DDP is rebuilt to exchange only what still trains. One line on the console says so.
    Logged losses carry `phase` and `trained_parameters`. The boundaries are kept in Trainer's checkpoints, so a
    resumed run keeps them, whatever else was changed.

    Args:
        stop_at_boundary: end the run right at each boundary, with a checkpoint. For tools that keep copies, shapes or
            lists of parameters, and can't bear that those change in the middle of a run. In one process or under DDP
            the checkpoint holds the adapter as the next phase finds it. The same run, resumed from there
            (`trainer.train(resume_from_checkpoint=True)`), trains what is left, up to the next boundary or the end.
            Under FSDP and DeepSpeed a new run loads the adapter from the checkpoint and does not resume
            (docs/distributed.md, "Two runs").

    Raises:
        ScheduleError: when training begins: it is shorter than the phases need, or a phase has nothing to train.
        ValueError: when training begins: the model holds no adapter of this package; `stop_at_boundary` with
            `load_best_model_at_end`, with `save_strategy="best"` or with a sharded state under FSDP;
            `load_best_model_at_end` with a boundary ahead under DeepSpeed; the run was resumed from a half-written
            checkpoint.
    """

    def __init__(self, stop_at_boundary: bool = False) -> None:
        self.stop_at_boundary = stop_at_boundary
        #: By adapter: the first steps of its phases, and the fields of its config that a resumed run may not change.
        self.first_steps: dict[str, dict[str, int]] = {}
        self.fixed: dict[str, dict[str, Any]] = {}
        #: By adapter: what its config has learned that the adapter's file does not tell.
        self.learned: dict[str, dict[str, Any]] = {}
        #: What the run's checkpoints have, for who resumes from one.
        self.saved: Record = {}
        self._driver: PhaseDriver | None = None
        self._batch_size: int | None = None
        self._fresh: list[str] = []
        self._in_training = False

    def state(self) -> dict[str, Any]:
        """What Trainer keeps of this callback in its checkpoints, as `ExportableState` asks for it."""
        if self._driver is not None:
            self.learned.update({name: config.learned() for name, config in self._driver.configs().items()})
        attributes = {name: getattr(self, name) for name in ("first_steps", "fixed", "learned", "saved")}
        return {"args": {"stop_at_boundary": self.stop_at_boundary}, "attributes": attributes}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # A resumed run loads optimizer groups that hold whatever trained in any phase. If the adapter was loaded in
        # its last phase, the groups would be short, so all parts train until training begins.
        # Engines load their state by names, and hold on to all that trains when they are set up.
        driver, engine = self._driver_of(model), engine_of(args)
        tell(driver.enter_next_phases(), args, state)
        if engine is None:
            driver.prepare()
        elif engine == "FSDP":
            driver.hold_frozen()
        if state.is_world_process_zero:
            warn_if_half_written(args)  # no other event comes before Trainer reads a checkpoint
            if engine == "FSDP":
                warn_if_fresh(args, {name: config.present_phase for name, config in driver.configs().items()})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        driver = self._driver = self._driver_of(model)
        configs = driver.configs()
        restarted = self._in_training and args.auto_find_batch_size and state.train_batch_size != self._batch_size
        if restarted:
            # auto_find_batch_size begins the same training again with a smaller batch.
            driver.restart([name for name in self._fresh if name in configs])
        self._fresh = [name for name, config in configs.items() if not config.phases_complete]
        self._batch_size, self._in_training = state.train_batch_size, True

        if not configs:
            raise ValueError(
                "PhaseCallback found no adapter of peft_learners that is active and trained. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True), or make it active with model.set_adapter(...)."
            )
        self._refuse_lost_saves(args)
        # Read here, since Trainer restores callbacks only with `restore_callback_states_from_checkpoint`.
        name = type(self).__name__
        recorded = state.stateful_callbacks.get(name, {}).get("attributes", {}) if state.global_step > 0 else {}
        refuse_half_loaded(args, state, kwargs.get("lr_scheduler"), recorded.get("saved", {}))
        self.saved = record_of(args)
        self._check_same(configs, recorded.get("fixed", {}))
        for adapter, learned in recorded.get("learned", {}).items():
            for field, value in learned.items() if adapter in configs else ():
                configs[adapter].write(field, value)
        starts = driver.start(
            total_steps=state.max_steps,
            steps_per_epoch=_steps_per_epoch(args, kwargs.get("train_dataloader")),
            global_step=state.global_step,
            first_steps=recorded.get("first_steps"),
            optimizer=kwargs.get("optimizer"),
            wrappers=search_ddp_wrappers(model) or [model],  # under FSDP, or in an engine, there is no DDP to rebuild
            ends_by_itself=False,  # Trainer saves after the last step
            stops=self.stop_at_boundary,
            log=False,
        )
        self._check_engine(args, driver)
        self.first_steps = {**recorded.get("first_steps", {}), **driver.first_steps()}
        self.fixed = {**recorded.get("fixed", {}), **{n: config.fixed_in_training() for n, config in configs.items()}}
        # Trainer adds to a list at each save if there are several of us, and fails where a checkpoint had none.
        state.stateful_callbacks[name] = self.state()
        if len(driver.fresh_starts()) > 1:
            restart_schedule(kwargs.get("lr_scheduler"), args, driver.fresh_starts(), state.max_steps)
        self._record(driver, state, starts)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._driver is None:
            return
        starts = self._driver.update(state.global_step)
        if any(start.begins_anew for start in starts):
            self._forget_best(state)
        self._record(self._driver, state, starts)
        stopped = self._driver.stopped
        tell([*starts, *stopped], args, state)
        if self.stop_at_boundary and (starts or stopped) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self._driver.collect()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._driver is not None and control.should_save:
            self._driver.collect()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An evaluation on the boundary itself is one of a rewound adapter that has not been trained.
        if self._driver is not None and state.global_step > 0 and state.global_step in self._driver.fresh_starts():
            self._forget_best(state)

    @staticmethod
    def _forget_best(state: TrainerState) -> None:
        """What was best belongs to a training that is over: load_best_model_at_end and early stopping begin anew."""
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        last = self._driver.last_step() if self._driver is not None else None
        if last is None or logs is None or "loss" not in logs:
            return  # metrics of an evaluation stay as they are: they are summed up as numbers elsewhere
        extra = {"phase": last[0], "trained_parameters": last[1]}
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        driver, self._in_training = self._driver, False
        if driver is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The weights are those of the best checkpoint: so must be the record of what is complete.
            driver.go_back_to(state.best_global_step or state.global_step)
            self._warn_if_incomplete(driver, "the best checkpoint was written")
        else:
            self._warn_if_incomplete(driver, "training ended")
        driver.finish()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._driver is not None and args.save_strategy == SaveStrategy.BEST:  # whether to save is decided then
            self._driver.collect()

    def _refuse_lost_saves(self, args: TrainingArguments) -> None:
        """What would leave nothing at a boundary at which the run ends."""
        if self.stop_at_boundary and args.load_best_model_at_end:
            raise ValueError(
                "PhaseCallback(stop_at_boundary=True) ends the run at a boundary with the adapter as it is there, but "
                "load_best_model_at_end=True would put an earlier one in its place. Leave one of the two out."
            )
        if self.stop_at_boundary and args.save_strategy == SaveStrategy.BEST:
            raise ValueError(
                "PhaseCallback(stop_at_boundary=True) saves the adapter at the boundary, and save_strategy='best' may "
                "not. Take save_strategy='epoch', 'steps' or 'no'."
            )

    def _check_engine(self, args: TrainingArguments, driver: PhaseDriver) -> None:
        """What Trainer's own settings make of an engine's boundary."""
        engine = engine_of(args)
        if driver.leaves_boundary and engine == "FSDP":
            plugin = AcceleratorState().fsdp_plugin
            if "SHARDED" in str(getattr(plugin, "state_dict_type", "")):
                raise ValueError(
                    "PhaseCallback(stop_at_boundary=True): with fsdp_state_dict_type='SHARDED_STATE_DICT' checkpoints "
                    "hold no adapter for the second run to load. Take 'FULL_STATE_DICT'."
                )
        crosses = any(schedule.phases[-1].first_step > driver.global_step for schedule in driver.schedules.values())
        if engine == "DEEPSPEED" and crosses and args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True can't go back under DeepSpeed to a checkpoint from before a phase "
                "boundary. Leave it out, or train in two runs: PhaseCallback(stop_at_boundary=True), then the last "
                "phase with load_best_model_at_end=True."
            )

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            warn_of_local_base(getattr(model, "peft_config", {}))

    @staticmethod
    def _check_same(configs: dict[str, PhasedConfig], recorded: dict[str, dict[str, Any]]) -> None:
        for name, fixed in recorded.items():
            now = configs[name].fixed_in_training() if name in configs else fixed
            for key, value in fixed.items():
                if now[key] != value:
                    raise ScheduleError(
                        f"The checkpoint was trained with {key}={value}, but the adapter {name!r} has "
                        f"{key}={now[key]}, which would change what the stored values mean. Resume with {key}={value}."
                    )

    @staticmethod
    def _driver_of(model: Any) -> PhaseDriver:
        driver = PhaseDriver.of(model)
        if not any(isinstance(config, PhasedConfig) for config in getattr(driver.root, "peft_config", {}).values()):
            raise ValueError(
                "PhaseCallback found no adapter of peft_learners in the model (or several parts of it with adapters, "
                "which it can't drive together). Wrap the model first: "
                "model = get_peft_model(model, LearnerConfig(...)), or leave the callback out."
            )
        return driver

    @staticmethod
    def _record(driver: PhaseDriver, state: TrainerState, starts: list[PhaseStart]) -> None:
        known = {(log.get("adapter"), log["phase"]) for log in state.log_history if "phase_first_step" in log}
        for start in starts:
            if (start.adapter, start.phase) not in known:  # a resumed run has it already
                state.log_history.append(
                    {
                        "adapter": start.adapter,
                        "phase": start.phase,
                        "phase_first_step": start.first_step,
                        "trained_parameters": start.trained_after,
                        "step": state.global_step,
                    }
                )

    @staticmethod
    def _warn_if_incomplete(driver: PhaseDriver, when: str) -> None:
        for name, schedule in driver.schedules.items():
            phase, last = schedule.phase_at(driver.global_step), schedule.phases[-1]
            if phase is not last:
                warnings.warn(
                    f"When {when}, at step {driver.global_step}, the adapter {name!r} was still in its phase "
                    f"{phase.name!r}, which lasts until step {last.first_step}: the phase {last.name!r} never began.",
                    stacklevel=2,
                )


def engine_of(args: TrainingArguments) -> str | None:
    """ "FSDP" or "DEEPSPEED", if one of them trains: by Trainer's arguments, or as `accelerate launch` says."""
    for engine, given in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if given or os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("true", "1"):
            return engine
    return None


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Optimizer steps of one epoch, as Trainer counts them; None for data without a length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))
