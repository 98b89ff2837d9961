"""The one place that touches PEFT's tables.

PEFT has no plugin mechanism: `register_peft_method` wants a member of the `PeftType` enum. A plain string would do for
PEFT itself, but transformers calls `peft_type.value`, so a real member is made, on the interpreter's own machinery,
and checked afterwards: if PEFT's tables or Python's enum change shape, the import fails with a sentence that says so.
"""

from __future__ import annotations

import enum
import sys
from typing import Any

import peft.mapping as tables
from peft import PeftConfig
from peft.utils import PeftType, register_peft_method

#: Config classes by the names of their methods.
_METHODS: dict[str, Any] = {}


def _restore(name: str) -> PeftType:
    """What a pickled member is rebuilt by: importing this module imports the plugin, and with it the member."""
    return PeftType[name]


def ensure_peft_type(name: str) -> PeftType:
    """The member `PeftType.<name>` with `value == name`, made if it does not exist. Idempotent.

    Raises:
        RuntimeError: the enum does not hold the new member afterwards in every way PEFT and transformers use it.
    """
    if name not in PeftType.__members__:
        try:
            _add_member(name)
        except Exception as error:
            raise RuntimeError(_shape_error(f"adding the member {name} to PeftType failed: {error!r}")) from error
    member = PeftType.__members__.get(name)
    if not (
        isinstance(member, PeftType)
        and member.value == name == member.name == str.__str__(member)
        and PeftType(name) is member is PeftType[name] is getattr(PeftType, name, None)
        and member in list(PeftType)
        and name in list(PeftType)
        and hash(member) == hash(name)
    ):
        raise RuntimeError(_shape_error(f"PeftType.{name} is not a usable member"))
    return member


def _add_member(name: str) -> None:
    if sys.version_info >= (3, 11):
        _add_by_proto_member(PeftType, name)
    else:
        _add_by_tables(PeftType, name)
    # Enum members pickle by name, which fails in a process that has not imported the plugin.
    PeftType[name].__reduce_ex__ = lambda protocol: (_restore, (name,))  # type: ignore[method-assign, assignment]


def _add_by_proto_member(cls: Any, name: str) -> None:
    """As the class body does it since Python 3.11."""
    proto = enum._proto_member(name)  # type: ignore[attr-defined]
    type.__setattr__(cls, name, proto)
    proto.__set_name__(cls, name)


def _add_by_tables(cls: Any, name: str) -> None:
    """As the metaclass of Python 3.10 does it."""
    member = str.__new__(cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = cls
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member


def register(config_cls: type, model_cls: type) -> None:
    """Register a method with PEFT as `PeftType.<METHOD>`. Idempotent; fails loudly.

    Args:
        config_cls: the method's `PhasedConfig`. Its `method` is the name, in lower case; parameters' names begin with
            `<method>_`, as transformers derives it.
        model_cls: the method's `PhasedModel`.

    Raises:
        RuntimeError: another package holds the name, or PEFT's tables have changed shape.
    """
    name: str = config_cls.method  # type: ignore[attr-defined]
    peft_type = ensure_peft_type(name.upper())
    known = tables.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if known is None:
        try:
            register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
        except Exception as error:
            raise RuntimeError(_shape_error(f"registering {name!r} failed: {error!r}")) from error
    registered = (
        tables.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type),
        tables.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type),
        tables.PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_type),
    )
    expected = (config_cls, model_cls, f"{name}_")
    if registered != expected:
        raise RuntimeError(_shape_error(f"PEFT's tables hold {registered} for {name!r}, expected {expected}"))
    _METHODS[name] = config_cls


def methods() -> dict[str, Any]:
    """The config classes of all methods by name, in the order of their registration: what tools iterate over."""
    return dict(_METHODS)


def config_with_field(name: str) -> str | None:
    """Name of a config of PEFT's own that has a field of this name: LoRA's, if it is one; None if there is none."""
    kinds = [kind for kind in tables.PEFT_TYPE_TO_CONFIG_MAPPING.values() if kind not in _METHODS.values()]
    kinds.sort(key=lambda kind: kind.__name__ != "LoraConfig")
    return next((kind.__name__ for kind in kinds if name in getattr(kind, "__dataclass_fields__", {})), None)


def tuner_of(config: PeftConfig) -> Any:
    """The tuner class that a config belongs to."""
    return tables.PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]


def _shape_error(what: str) -> str:
    import peft

    return (
        f"peft_learners can't register with PEFT {peft.__version__} on Python {sys.version.split()[0]}: {what}. "
        "It was made for peft>=0.21.2,<0.22: install that (`pip install 'peft>=0.21.2,<0.22'`) or a newer "
        "peft-learners."
    )
