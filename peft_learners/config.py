"""What the configurations of all phased tuners share: choice of modules, phase record, checks with whole sentences."""

from __future__ import annotations

import copy
import difflib
import functools
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Optional, TypeVar, Union

from peft.config import PeftConfig
from peft.utils import PeftType

from .phases.schedule import Schedule

SAVE_DTYPES = ("float32", "bfloat16", "float16")
C = TypeVar("C", bound=type)


def names_unknown_fields(cls: C) -> C:
    """Class decorator for a dataclass: an unknown field is refused with the nearest known one."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in fields(cls) if f.init]
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(known)}."
                # PEFT recognises configs of newer versions by the first words of this sentence.
                raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name!r}. {hint}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def require(ok: bool, config: object, name: str, right: str, corrected: str = "") -> None:
    """Raise ValueError with the field, the value it got and what would be right."""
    if not ok:
        call = f" For example: {type(config).__name__}({corrected})." if corrected else ""
        raise ValueError(f"{type(config).__name__}: `{name}` must be {right}, got {getattr(config, name)!r}.{call}")


def is_number(value: object) -> bool:
    """A finite int or float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass
class PhasedConfig(PeftConfig):
    """Fields that every tuner of this package has.

    The last three are written by training and saved with the adapter: an adapter whose phases are complete goes on in
    its last phase when it is loaded for more training. `model.base_model.restart_phases()` starts them again.
    """

    #: What people call the method; "": as its class.
    display_name: ClassVar[str] = ""
    #: What the method does, with its sources: some sentences of a model card, in Markdown.
    about: ClassVar[str] = ""
    #: Sentence of an error: why nothing can hold what the adapter does but itself; "" where a weight can.
    unmergeable: ClassVar[str] = ""

    target_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None,
        metadata={
            "help": "Names (or a regex) of the modules to adapt. None: found from the model's structure; Learners "
            "take every linear layer of the backbone (a pooler only if the model has a head that uses it) and, with "
            "train_norms, the norms of its blocks in any case; NAS-LoRA the linear layers of the blocks without value "
            "projections; FAR all that has parameters; bottleneck adapters the layers that they follow (in parallel "
            "mode the FFNs' last ones). 'all-linear': every linear layer of the backbone."
        },
    )
    exclude_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None, metadata={"help": "Names (or a regex) of modules to leave alone; wins over target_modules."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Indices of the blocks to adapt. None: all. Not with a regex target_modules."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Name of the list that holds the blocks (e.g. 'layer'), for layers_to_transform."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Modules trained whole and saved with the adapter, beside the new head, which is found by itself."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "False: random non-zero values (std 0.05) everywhere. For tests; don't train from it."},
    )
    save_dtype: Optional[str] = field(
        default=None,
        metadata={
            "help": "'bfloat16' or 'float16': save the adapter's floating-point values in that type (half the file). "
            "None: as they are. Checkpoints written while a schedule runs (PhaseCallback's, or that of set_schedule "
            "until its total_steps or finish_phases()) keep full precision, so that a resumed run is exact."
        },
    )
    completed_phases: list[str] = field(
        default_factory=list, metadata={"help": "Phases that are over. Written by training; not for the user."}
    )
    phase_first_steps: Optional[dict[str, int]] = field(
        default=None,
        metadata={"help": "First optimizer step of each phase. Written when training starts; not for the user."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value)
            require(value is None or isinstance(value, str) or names, self, name, "None, a regex or a list of names")
            if names:
                setattr(self, name, set(value))
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            layers = [layers] if isinstance(layers, int) else layers
            ok = isinstance(layers, (list, tuple)) and all(isinstance(i, int) and i >= 0 for i in layers)
            require(ok, self, "layers_to_transform", "an index or a list of indices of blocks")
            if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
                raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern is not None:
            if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
                raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
            if not self.layers_to_transform and self.layers_to_transform != 0:
                raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        require(isinstance(self.init_weights, bool), self, "init_weights", "True or False")
        require(self.save_dtype in (None, *SAVE_DTYPES), self, "save_dtype", f"None or one of {SAVE_DTYPES}")

    def _set_peft_type(self, name: str) -> None:
        self.peft_type = PeftType(name)

    # -- one object, several models ---------------------------------------------------------------------------------

    def claim(self, root: Any, adapter: str) -> None:
        """Called when the object becomes the config of an adapter in the model `root`.

        Injection and training write into an adapter's config. PEFT keeps the user's own object there, which he may
        well use for the next model too: the earlier adapter then keeps a copy with what it has learned about itself,
        and this object goes back to what the user had given.
        """
        owner = self.__dict__.get("_owner")
        if owner is not None:
            model, name = owner[0](), owner[1]
            configs = getattr(model, "peft_config", {}) if model is not None else {}
            if configs.get(name) is self and (model is not root or name != adapter):
                configs[name] = copy.deepcopy(self)
                configs[name]._owner = owner
            for name, (given, written) in self.__dict__.get("_written", {}).items():
                if getattr(self, name) == written:
                    setattr(self, name, copy.deepcopy(given))
        self._owner = (weakref.ref(root), adapter)
        self._written: dict[str, tuple[Any, Any]] = {}

    def write(self, name: str, value: Any) -> None:
        """Set a field from inside the package, remembering what the user had given."""
        given = self.__dict__.setdefault("_written", {}).get(name, (copy.deepcopy(getattr(self, name)),))[0]
        setattr(self, name, value)
        self._written[name] = (given, copy.deepcopy(value))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_owner", "_written")}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        from .hub.readme import write_readme  # `hub` itself exports what is built on configs

        owner = self.__dict__.get("_owner")
        model = owner[0]() if owner is not None else None
        write_readme(self, Path(save_directory), model, kwargs.get("auto_mapping_dict"))

    # -- what a tuner's config answers about its phases ------------------------------------------------------------

    def schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """All phases of a fresh adapter, laid over a training of `total_steps` optimizer steps."""
        raise NotImplementedError

    def whole_schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """The schedule of a run that is resumed without a record of its boundaries: phases that are over count too."""
        return self.schedule(total_steps, steps_per_epoch)

    def outline(self) -> Schedule:
        """All phases in order, on steps of no meaning: for schedules whose steps are recorded or no longer matter."""
        raise NotImplementedError

    def fixed_in_training(self) -> dict[str, Any]:
        """Fields that decide what the stored values mean: a resumed run may not change them."""
        return {}

    @property
    def phases_complete(self) -> bool:
        """Whether the adapter is in its last phase."""
        raise NotImplementedError

    # -- what a model card says of an adapter ------------------------------------------------------------------------

    def trained_by_phase(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Optional[int]]:
        """Number of parameters that each of the adapter's phases trains; None where its file does not tell.

        Args:
            shapes: of the values in its file, by name.
        """
        phases = [phase.name for phase in self.outline().phases]
        count = sum(math.prod(shape) for shape in shapes.values())
        return dict.fromkeys(phases, count if len(phases) == 1 else None)

    def card_sections(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Further sections of the adapter's card: Markdown by heading."""
        return {}
