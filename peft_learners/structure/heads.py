"""Modules that are trained whole: the new head, as structure tells it, and what `modules_to_save` names.

PEFT takes every module for one whose name *ends* like an entry of `modules_to_save`, containers of tuner layers among
them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from .modules import (
    block_names,
    is_linear,
    is_within,
    new_head,
    original_of,
    parts_outside,
    pretrained_parts,
    transformers_model,
    walk,
)


def whole_modules(
    model: nn.Module, given: Sequence[str], elsewhere: Collection[str], own: Collection[str], config: str
) -> tuple[list[str], dict[str, str]]:
    """Names of what is trained whole, `given` and the new head, and `{name: reason}` of what can't be by its name.

    Args:
        given: entries of `modules_to_save`.
        elsewhere: names of modules that the config names for something else: excluded ones and targets.
        own: names of the modules in the tuner's layers.
        config: name of the config's class, for messages.

    Raises:
        ValueError: an entry matches one of `own`.
    """
    refuse_own(model, given, own, config)
    saved, outer = list(given), transformers_model(model)[0]
    apart: dict[str, str] = {}
    for name in new_head(model):
        if outer and (is_within(name, elsewhere) or any(other.startswith(f"{name}.") for other in elsewhere)):
            continue
        inside = [n for n, _ in walk(model) if n.startswith(f"{name}.") and any(n.endswith(entry) for entry in given)]
        if outer and inside:  # the user has told which of its parts are new
            continue
        reason = _not_by_name(model, name, own) if outer else ""
        if reason and not any(name.endswith(entry) for entry in given):
            apart[name] = reason
        elif name not in saved:
            saved.append(name)
    if len(inner := list(pretrained_parts(model))) > 1:  # structure does not tell whether it is new
        for name in parts_outside(model, inner)[0]:
            if not (is_within(name, elsewhere) or any(name.endswith(entry) for entry in given)):
                apart[name] = _not_by_name(model, name, own)
    return saved, apart


def refuse_own(model: nn.Module, given: Iterable[str], own: Collection[str], config: str) -> None:
    """PEFT would put the tuner's own containers aside with the module that is meant.

    Raises:
        ValueError: an entry matches one of them.
    """
    for entry in given:
        hit = next((name for name in sorted(own) if name.endswith(entry)), None)
        if hit is None:
            continue
        names = [name for name, _ in walk(model) if name and name.endswith(entry)]
        longer = [".".join(name.split(".")[-2:]) for name in names if "." in name]
        if longer:
            right = f"more of the module's name, modules_to_save=[{longer[0]!r}]"
        elif names:
            right = f"another name in your model (self.new_{names[0]}), modules_to_save=['new_{names[0]}']"
        else:
            right = "the name of one of the model's modules"
        raise ValueError(
            f"{config}: `modules_to_save` must match no module of the adapter's own, got {entry!r}: PEFT takes all "
            f"whose names end like it, and the adapter has {hit!r} in its layers. Give {right}."
        )


def _not_by_name(model: nn.Module, name: str, own: Collection[str]) -> str:
    """Why PEFT can't train this module whole and no other one; "" if it can."""
    for hit in sorted(own):
        if hit.endswith(name):
            return f"the adapter's layers have modules called {hit}"
    for other, module in walk(model):
        if other != name and other.endswith(name) and any(True for _ in original_of(module).parameters()):
            return f"{other} ends like it"
    return ""


def warn_of_rest(
    model: nn.Module,
    saved: list[str],
    apart: dict[str, str],
    targets: Collection[str],
    by_structure: bool,
    config: str,
) -> None:
    """Name what of a user's own module may be new, but is neither trained whole nor saved.

    Args:
        saved, apart: see `whole_modules`.
        targets: names of the modules that are adapted, or excluded.
        by_structure: whether they were found by structure.
        config: name of the config's class.
    """
    inner = list(pretrained_parts(model))
    if not inner:
        if by_structure and not isinstance(model, PreTrainedModel):
            _warn_of_plain_head(model, saved, targets, config)
        return
    good = [name for name, reason in apart.items() if not reason]
    if good:
        _warn(
            f"The {type(model).__name__} holds {len(inner)} transformers models ({short(inner)}), so that structure "
            f"does not tell what is new in it. The values of {short(good)} stay as they are and are not in the "
            f"adapter's file. If they are new: {config}(modules_to_save={saved + good})."
        )
    for name, reason in apart.items():
        if reason:
            _warn(
                f"{name} is outside the pretrained model, but it stays frozen and unsaved: PEFT takes modules_to_save "
                f"by the endings of names, and {reason}. Give it another name in your model (self.new_{_last(name)}), "
                "which is then found by itself, or leave it so with "
                f"{config}(exclude_modules={_regex([name])})."
            )
    bare = parts_outside(model, inner)[1]
    lost = [n for n in bare if not (is_within(n, targets) or any(_owner(n).endswith(entry) for entry in saved))]
    if lost:
        _warn(
            f"Outside the pretrained model of the {type(model).__name__}, but frozen and unsaved: {short(lost)}, of "
            "no module that could be copied without parameters of the pretrained model. What of it is new belongs "
            "into a module of its own (self.new = New(), which is called). That is found by itself, as "
            f"{config}(modules_to_save=['new']) names it."
        )
    frozen = [name for name in saved if _is_frozen(model, name)]
    if frozen:
        _warn(
            f"Outside the pretrained model of the {type(model).__name__}, and frozen before the adapter was added: "
            f"{short(frozen)}. It counts as new, and is trained whole and saved. To leave it alone: "
            f"{config}(exclude_modules={_regex(frozen)})."
        )


def _warn_of_plain_head(model: nn.Module, saved: list[str], targets: Collection[str], config: str) -> None:
    """The same where no part is a transformers model: linear layers behind the blocks."""
    blocks = set(block_names(model))
    names = [name for name, _ in walk(model)]
    last = max((i for i, name in enumerate(names) if is_within(name, blocks)), default=len(names))
    found = [name for name in names[last + 1 :] if is_linear(original_of(model.get_submodule(name)))]
    idle = [n for n in found if not (is_within(n, targets) or any(n.endswith(entry) for entry in saved))]
    if idle:
        _warn(
            f"Frozen, and not in the adapter's file: {short(idle)} of the {type(model).__name__}. If that is new (a "
            f"head): {config}(modules_to_save={[*saved, *idle]})."
        )


def _is_frozen(model: nn.Module, name: str) -> bool:
    """Whether someone froze a module before the first adapter, in a model that otherwise trains."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return False
    modules = [m for n, m in walk(model) if n == name]
    return bool(modules) and modules[0] is original_of(modules[0]) and not _trains(modules[0])


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _regex(names: Sequence[str]) -> str:
    """What to give as `exclude_modules` for these modules alone."""
    return repr("|".join(map(re.escape, names)))


def short(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
