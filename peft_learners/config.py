"""What the configurations of all phased tuners share: choice of modules, phase record, checks with whole sentences."""

from __future__ import annotations

import copy
import difflib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Optional, TypeVar, Union

from peft import PeftConfig
from peft.utils import PeftType

from .phases.schedule import Schedule, ScheduleError, lay_out
from .registry import config_with_field
from .structure.patterns import first_fault

#: Largest absolute value of a factor or a number of epochs, and largest whole number.
LARGEST, LARGEST_WHOLE = 1_000_000, 2**63 - 1
NOT_ZERO = f"a number other than 0, at most {LARGEST:,} in absolute value"
#: Fields that say nothing about an adapter's parameters in the layers. PEFT itself writes into some of them.
_NOT_OF_THE_FORM = {field.name for field in fields(PeftConfig)} | {
    "modules_to_save",
    "init_weights",
    "save_dtype",
    "phase_first_steps",
    "kept_energy",
}
SAVE_DTYPES = ("float32", "bfloat16", "float16")
C = TypeVar("C", bound=type)


def names_unknown_fields(cls: C) -> C:
    """Class decorator for a config: an unknown field is refused, with what it is called here."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in fields(cls) if f.init]
        for name in kwargs:
            if name not in known:
                # PEFT recognises configs of newer versions by the first words of this sentence.
                raise TypeError(
                    f"{cls.__name__} got an unexpected keyword argument {name!r}. {_hint(cls, name, known)}"
                )
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _hint(cls: Any, name: str, known: list[str]) -> str:
    """What an unknown field of a config is called here, if anything."""
    if name in cls.elsewhere:
        return f"{cls.elsewhere[name]}."
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    owner = config_with_field(name)
    if owner is not None:
        return f"It is a field of PEFT's {owner}, and {cls.__name__} has none like it: leave it out."
    return f"It has: {', '.join(known)}."


@dataclass(frozen=True)
class Check:
    """What the value of a config's field must be.

    Attributes:
        ok: whether a value is right.
        right: what would be, in words.
        example: a corrected argument, e.g. "r=64".
        regexes: those that a right value holds.
    """

    ok: Callable[[Any], bool]
    right: str
    example: str = ""
    regexes: Callable[[Any], Iterable[str]] = lambda value: ()

    def __call__(self, config: object, name: str) -> None:
        """Raise ValueError with the field, the value it got and what would be right."""
        value, kind = getattr(config, name), type(config).__name__
        if not self.ok(value):
            call = f" For example: {kind}({self.example})." if self.example else ""
            raise ValueError(f"{kind}: `{name}` must be {self.right}, got {shown(value)}.{call}")
        fault = first_fault(self.regexes(value))
        if fault:
            raise ValueError(
                f"{kind}: `{name}` must hold regexes that match in a bounded time, got {shown(value)}: {fault}."
            )


def shown(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def option(default: Any, help: str, check: Check | None = None) -> Any:
    """A field of a config: its default (or what makes one), its help text, and its check."""
    metadata = {"help": help} if check is None else {"help": help, "check": check}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


def is_number(value: object) -> bool:
    """An int or float of at most `LARGEST`, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_whole(value: object, least: int = 0) -> bool:
    """An int from `least` to `LARGEST_WHOLE`, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_WHOLE


def is_positive_int(value: object) -> bool:
    return is_whole(value, 1)


def is_share(value: object) -> bool:
    """A float above 0 and below 1."""
    return isinstance(value, float) and 0 < value < 1


def is_names(value: object) -> bool:
    """Several names, in any order."""
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(n, str) and n for n in value)


def is_names_or_regex(value: object) -> bool:
    return value is None or isinstance(value, str) or is_names(value)


def regex_in(value: object) -> list[str]:
    """The regex that the value of a field is, if it is one, and not names."""
    return [value] if isinstance(value, str) else []


def names_or_regex_in(value: Any) -> list[str]:
    """The names of a field whose names are read as regexes, too."""
    return regex_in(value) or list(value or ())


def one_of(values: tuple[str, ...], example: str = "") -> Check:
    return Check(lambda value: isinstance(value, str) and value in values, f"one of {values}", example)


FLAG = Check(lambda value: isinstance(value, bool), "True or False")
NAMES = Check(is_names_or_regex, "None, a regex or a list of names", regexes=regex_in)
SEED = Check(is_whole, "a whole number from 0 to 2**63 - 1")
TEXT = Check(lambda value: value is None or isinstance(value, (str, Path)), "None or a text")


def _is_blocks(value: object) -> bool:
    return all(map(is_whole, value)) if isinstance(value, (list, tuple)) else is_whole(value)


#: Checks of the fields that PEFT's configs have.
INHERITED = {
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "peft_version": TEXT,
    "inference_mode": FLAG,
    "auto_mapping": Check(lambda value: value is None or isinstance(value, dict), "None or a dict"),
}


@dataclass
class PhasedConfig(PeftConfig):
    """Fields that every tuner of this package has.

    `completed_phases`, `next_phase` and `phase_first_steps` are written by training and saved with the adapter: one
    whose phases are complete goes on in its last phase when it is loaded for more training.
    `model.base_model.restart_phases()` starts them again.

    Raises:
        ValueError: a field with a value that can't be right; the sentence names field, value and what would be.
        TypeError: an unknown field.
    """

    #: Name under which the method is registered with PEFT, in lower case: parameters' names begin with it.
    method: ClassVar[str]
    #: What people call the method; "": as its class.
    display_name: ClassVar[str] = ""
    #: What the method does, with its sources: some sentences of a model card, in Markdown.
    about: ClassVar[str] = ""
    #: Which modules are adapted where `target_modules` is None, for the table of fields.
    default_targets: ClassVar[str] = ""
    #: Fields by which a user chooses what is adapted or primed: while all of them have their defaults, he may not know
    #: what the adapter costs.
    narrowing: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "layers_to_transform")
    #: Fields of other PEFT methods' configs: what they are called here.
    elsewhere: ClassVar[Mapping[str, str]] = {}
    #: Sentence of an error: why nothing can hold what the adapter does but itself; "" where a weight can.
    unmergeable: ClassVar[str] = ""

    target_modules: Optional[Union[list[str], set[str], str]] = option(
        None,
        "Names (or a regex) of the modules to adapt. None: found from the model's structure. 'all-linear': every "
        "linear layer of the backbone.",
        NAMES,
    )
    exclude_modules: Optional[Union[list[str], set[str], str]] = option(
        None,
        "Names (or a regex) of modules to leave alone; wins over target_modules.",
        NAMES,
    )
    layers_to_transform: Optional[Union[list[int], int]] = option(
        None,
        "Indices of the blocks to adapt. None: all. Not with a regex target_modules.",
        Check(lambda value: value is None or _is_blocks(value), "an index or a list of indices of blocks"),
    )
    layers_pattern: Optional[Union[list[str], str]] = option(
        None,
        "Name of the list that holds the blocks (e.g. 'layer'), for layers_to_transform.",
        Check(is_names_or_regex, "None, a name or a list of names", "layers_pattern='layer'", names_or_regex_in),
    )
    modules_to_save: Optional[list[str]] = option(
        None,
        "Modules trained whole and saved with the adapter, beside the new head, which is found by itself.",
        Check(
            lambda value: value is None or is_names(value),
            "None or a list of names",
            "modules_to_save=['classifier']",
            names_or_regex_in,  # PEFT reads names as regexes here
        ),
    )
    init_weights: bool = option(
        True, "False: random non-zero values (std 0.05) everywhere. For tests; don't train from it.", FLAG
    )
    save_dtype: Optional[str] = option(
        None,
        "'bfloat16' or 'float16': save the adapter's floating-point values in that type (half the file). None: as "
        "they are. Checkpoints written while a schedule runs (PhaseCallback's, or that of set_schedule until its "
        "total_steps or finish_phases()) keep full precision, so that a resumed run is exact.",
        Check(
            lambda value: value is None or (isinstance(value, str) and value in SAVE_DTYPES),
            f"None or one of {SAVE_DTYPES}",
        ),
    )
    completed_phases: list[str] = option(
        list,
        "Phases that are over. Written by training; not for the user.",
        Check(lambda value: isinstance(value, list) and is_names(value), "a list of names of phases"),
    )
    next_phase: Optional[str] = option(
        None,
        "Phase whose boundary the last run has stopped at, under an engine that can't cross it: the next training "
        "begins with it. Written by training; not for the user.",
        Check(lambda value: value is None or isinstance(value, str), "None or the name of a phase"),
    )
    phase_first_steps: Optional[dict[str, int]] = option(
        None,
        "First optimizer step of each phase. Written when training starts; not for the user.",
        Check(
            lambda value: (
                value is None or (isinstance(value, dict) and len(value) > 0 and all(map(is_whole, value.values())))
            ),
            "None or a dict with a whole number for each phase",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        for f in fields(self):
            check = f.metadata.get("check", INHERITED.get(f.name))
            if check is not None:
                check(self, f.name)
        self._check_phases()
        for name in ("target_modules", "exclude_modules"):
            if is_names(getattr(self, name)):
                setattr(self, name, set(getattr(self, name)))
        by_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and by_regex:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern is not None and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    @classmethod
    def shown_name(cls) -> str:
        """What people call the method: `display_name`, or the class without "Config"."""
        return cls.display_name or cls.__name__.removesuffix("Config")

    def _check_phases(self) -> None:
        """Phases that are recorded must be those of the method."""
        known = self._all_phases()
        for name in ("completed_phases", "phase_first_steps", "next_phase"):
            phases = getattr(self, name) or ()
            unknown = [phase for phase in ([phases] if isinstance(phases, str) else phases) if phase not in known]
            if unknown:
                raise ValueError(
                    f"{type(self).__name__}: `{name}` must name phases of the method, which are {', '.join(known)}, "
                    f"got {shown(getattr(self, name))}."
                )

    # -- one object, several models ---------------------------------------------------------------------------------

    def claim(self, root: Any, adapter: str) -> str | None:
        """Called when the object becomes the config of an adapter in the model `root`.

        Injection and training write into an adapter's config. PEFT keeps the user's own object there, which he may
        well use for the next model too: the earlier adapter then keeps a copy with what it has learned about itself,
        and this object goes back to what the user had given. On the same model, once a phase is over, it is a clone
        that is asked for (`model.add_adapter("ref", model.peft_config["default"])`): the object stays as it is.

        Returns:
            Name of the adapter that the new one is a clone of, if it is one.
        """
        owner = self.__dict__.get("_owner")
        if owner is not None:
            model, name = owner[0](), owner[1]
            configs = getattr(model, "peft_config", {}) if model is not None else {}
            if configs.get(name) is self and (model is not root or name != adapter):
                configs[name] = copy.deepcopy(self)
                configs[name]._owner = owner
            if model is root and name != adapter and self.completed_phases:
                self._owner, self._name, self.cloned_from = (weakref.ref(root), adapter), adapter, name
                return name
            for name, (given, written) in self.__dict__.get("_written", {}).items():
                if getattr(self, name) == written:
                    setattr(self, name, copy.deepcopy(given))
        copied_from, configs = self.__dict__.get("_name"), getattr(root, "peft_config", {})
        self._owner, self._name, self.cloned_from = (weakref.ref(root), adapter), adapter, None
        self._written: dict[str, tuple[Any, Any]] = {}
        # A copy of the config of an adapter here (or of one that was loaded twice) asks for a clone, too.
        alike = [name for name, other in configs.items() if name != adapter and self._has_form_of(other)]
        return copied_from if copied_from in alike else next(iter(alike), None)

    def _has_form_of(self, other: PeftConfig) -> bool:
        """Whether it describes the parameters and buffers of another one's adapter, of which a phase is over."""
        if type(other) is not type(self) or not self.completed_phases:
            return False
        mine, theirs = self.to_dict(), other.to_dict()
        return all(mine[key] == theirs[key] for key in mine if key not in _NOT_OF_THE_FORM)

    def write(self, name: str, value: Any) -> None:
        """Set a field from inside the package, remembering what the user had given."""
        given = self.__dict__.setdefault("_written", {}).get(name, (copy.deepcopy(getattr(self, name)),))[0]
        setattr(self, name, value)
        self._written[name] = (given, copy.deepcopy(value))

    def given(self, name: str) -> Any:
        """A field as the user gave it, whatever the package has written there since."""
        written = self.__dict__.get("_written", {})
        return written[name][0] if name in written else getattr(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_owner", "_written", "cloned_from")}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        from .hub.short_card import write_readme  # `hub` itself exports what is built on configs

        owner = self.__dict__.get("_owner")
        model = owner[0]() if owner is not None else None
        write_readme(self, Path(save_directory), model, kwargs.get("auto_mapping_dict"))

    # -- what a config answers about its phases: one, unless the method has more ------------------------------------

    def schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """All phases of a fresh adapter, laid over a training.

        Args:
            total_steps: optimizer steps of the whole training, None if unknown.
            steps_per_epoch: optimizer steps of one epoch, None if unknown.

        Raises:
            ScheduleError: the phases need a number of steps that is unknown, or more than there are.
        """
        return self.outline()

    def _known(self, steps: int | None, of: str, field: str, advice: str) -> int:
        """A number of steps that the value of a field counts on.

        Args:
            of: which steps: "in an epoch", "of the whole training".
            advice: how to do without.

        Raises:
            ScheduleError: it is unknown.
        """
        if steps is None:
            raise ScheduleError(
                f"{field}={getattr(self, field)} needs the number of optimizer steps {of}, which is unknown (data "
                f"without a length?). {advice}"
            )
        return steps

    def whole_schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """The schedule of a run that is resumed without a record of its boundaries: phases that are over count too."""
        return self.schedule(total_steps, steps_per_epoch)

    def outline(self) -> Schedule:
        """All phases in order, on steps of no meaning: for schedules whose steps are recorded or no longer matter."""
        return lay_out([("training", None)], None)

    @property
    def phase_names(self) -> list[str]:
        """Names of all phases, in order."""
        return [phase.name for phase in self.outline().phases]

    def _all_phases(self) -> list[str]:
        """The same, with those that an adapter may have behind it although its config has none of them now."""
        return self.phase_names

    def fixed_in_training(self) -> dict[str, Any]:
        """Fields that decide what the stored values mean: a resumed run may not change them."""
        return {}

    def learned(self) -> dict[str, Any]:
        """Fields that training writes and that neither the adapter's file nor the schedule tells."""
        return {}

    @property
    def phases_complete(self) -> bool:
        """Whether the adapter is in its last phase."""
        return True

    def boundary_facts(self) -> str:
        """What the line about a boundary that was just crossed has beside the sizes."""
        return ""

    @property
    def present_phase(self) -> str:
        """Name of the phase that the adapter is in: the one that training began or goes on with."""
        ahead = [name for name in self.phase_names if name not in self.completed_phases]
        return ahead[0] if ahead and not self.phases_complete else self.phase_names[-1]

    # -- what an adapter costs ---------------------------------------------------------------------------------------

    def savings(self) -> dict[str, str]:
        """What lowers the adapter's parameters or bytes: `{arguments: what they do}`, for a warning."""
        return {
            "layers_to_transform=[...]": "fewer blocks",
            "target_modules or exclude_modules": "fewer modules",
            **({} if self.save_dtype else {"save_dtype='bfloat16'": "half the file"}),
        }

    # -- what a model card says of an adapter ------------------------------------------------------------------------

    def trained_by_phase(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Optional[int]]:
        """Number of parameters that each of the adapter's phases trains; None where its file does not tell.

        Args:
            shapes: of the values in its file, by name.
        """
        phases = self.phase_names
        count = sum(math.prod(shape) for shape in shapes.values())
        return dict.fromkeys(phases, count if len(phases) == 1 else None)

    def card_sections(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Further sections of the adapter's card: Markdown by heading."""
        return {}

    # -- what `peft-learners show` says of it ------------------------------------------------------------------------

    def module_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        """What the adapter has in each module: rows with `module`, `parameters`, and what the method tells of it.

        Args:
            shapes: of the values in its file, by name.
        """
        return [
            {"module": module, "parameters": sum(map(math.prod, parts.values()))}
            for module, parts in self._parts_by_module(shapes).items()
        ]

    def _parts_by_module(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes in the adapter's file by module of the base model and, there, by what follows the module's name."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, shape in shapes.items():
            module, prefix, part = key.rpartition(f".{self.method}_")
            if prefix:
                found.setdefault(module.removeprefix("base_model.model."), {})[f"{prefix[1:]}{part}"] = shape
        return found
