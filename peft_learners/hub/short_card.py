"""The README.md that a saved adapter gets: short, and only where there is no text of the user's own.

PEFT's `save_pretrained` writes huggingface_hub's empty template, transformers' writes nothing. An adapter's config is
the last file that PEFT writes, so `PhasedConfig.save_pretrained` ends here. A whole card is made by `full_card.py`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import peft
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from .._version import __version__

CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
TAG = "peft-learners"
#: Remark on an adapter's name in a text that was written before it was pushed.
HERE = "this folder, or its id on the Hub"
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_BASE_TAG = "base_model:adapter:"
_MARK = "<!-- Written by peft-learners "
#: Beginnings of lines that PEFT and transformers add to a template.
_ADDED = (_MARK, "### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model that")


def write_readme(config: Any, folder: Path, model: Any = None, auto_mapping: Optional[dict[str, str]] = None) -> None:
    """Write the README.md of an adapter whose config was just saved.

    Nothing is written over a text that anybody changed, nor beside a config that belongs to no adapter.

    Args:
        config: the adapter's.
        folder: where the config is. PEFT saves the adapter "default" in the folder of the README.md, others below it.
        model: the base model, where it is at hand: transformers writes the weights after the config.
        auto_mapping: the base model's class, as PEFT saves it in a config without a task type.
    """
    top, subfolder = folder, None
    if not (folder / CARD).is_file():
        if (folder.parent / CARD).is_file() and any(folder.glob("adapter_model.*")):
            top, subfolder = folder.parent, folder.name
        elif model is None:
            return
    path = top / CARD
    try:
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "---\n{}\n---\n")
    except (yaml.YAMLError, ValueError):  # the weights are still to come: a header of the user's must not stop them
        return
    name = config.base_model_name_or_path
    if not is_untouched(card.text):
        if hide_local_base(card.data, name, folder):
            card.save(path)
        return
    fill_header(card.data, config.method, name if is_hub_id(name, folder) else None)
    if subfolder is None or not (top / CONFIG).is_file() or _MARK not in card.text:  # not about "default" already
        card.text = _short_text(config, folder, top.resolve().name, subfolder, model, auto_mapping)
    card.save(path)


def _short_text(
    config: Any, folder: Path, title: str, subfolder: Optional[str], model: Any, mapping: Optional[dict[str, str]]
) -> str:
    name, labels = config.base_model_name_or_path, None
    base = short_name(name, folder) if name else None
    if model is not None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    kind = auto_class(config, mapping)
    if has_labels(kind) and model is not None:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
    elif has_labels(kind) and (folder / WEIGHTS).is_file():
        labels = num_labels_in(config, kind, shapes_in(folder))
    usage = usage_text(
        kind,
        base,
        title,
        num_labels=labels,
        revision=config.revision,
        subfolder=subfolder,
        remark=HERE,
        local=not is_hub_id(name, folder),
    )
    about = first_sentence(config, base or (mapping or {}).get("base_model_class"))
    versions = f"- PEFT {peft.__version__}\n- peft-learners {__version__}"
    text = f"# {title}\n\n{about}\n\n## Use\n\n{usage}\n\n### Framework versions\n\n{versions}\n"
    return f"\n{_MARK}({_digest(text)}). A text that is changed is left as it is. -->\n\n{text}"


def fill_header(data: CardData, method: str, base: Optional[str]) -> None:
    """Say in a card's header what an adapter is; a base model that is not on the Hub is not named."""
    data["library_name"] = "peft"
    for key, value in (("base_model", base), ("base_model_relation", "adapter" if base else None)):
        data[key] = value
    tags = {tag for tag in data.get("tags") or () if not tag.startswith(_BASE_TAG)}
    data["tags"] = sorted({*tags, TAG, method, *([_BASE_TAG + base] if base else [])})


def hide_local_base(data: CardData, name: Optional[str], beside: Path) -> bool:
    """Take a local folder out of a card's header, where PEFT writes it as the base model.

    Returns:
        Whether it was there.
    """
    if not name or is_hub_id(name, beside) or data.get("base_model") != name:
        return False
    data["base_model"] = None
    data["tags"] = [tag for tag in data.get("tags") or () if tag != _BASE_TAG + name] or None
    return True


def is_untouched(text: str) -> bool:
    """Whether a card's text is ours, or huggingface_hub's template with nothing filled in, and nobody changed it."""
    lines = _lines(text)
    written = re.search(rf"^{re.escape(_MARK)}\((\w+)\)", text, re.M)
    return written[1] == _digest(text) if written else not lines or lines == _template()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_ADDED)]


@lru_cache
def _template() -> list[str]:
    return _lines(ModelCard.from_template(ModelCardData()).text)


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(_lines(text)).encode()).hexdigest()[:12]


def warn_of_local_base(configs: Mapping[str, Any]) -> None:
    """Warn of each adapter whose config, which is about to be uploaded, names a local folder as its base model."""
    for name, config in configs.items():
        base = getattr(config, "base_model_name_or_path", None)
        if base and not is_hub_id(base):
            warnings.warn(
                f"The adapter_config.json that is pushed names the local folder {base!r} as the base model, which "
                "nobody else has. If that model is on the Hub, say so before you push: "
                f'model.peft_config[{name!r}].base_model_name_or_path = "OWNER/NAME"',
                stacklevel=2,
            )


# -- names and code --------------------------------------------------------------------------------------------------


def first_sentence(config: Any, base: Optional[str], task: str = "") -> str:
    """What an adapter is. A method without a display name is called as its class."""
    name, of = config.shown_name(), f" of `{base}`" if base else ""
    return f"A {name} adapter{of}{task}, made with peft-learners, a plugin for PEFT."


def is_hub_id(name: object, beside: Optional[Path] = None) -> bool:
    """Whether a model's name can be its id on the Hub: it has that form, and is no local folder.

    Args:
        beside: an adapter's folder: a name that leads from it, or from a folder above, to a saved model is relative.
    """
    if not isinstance(name, str) or not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    above = [beside.resolve(), *beside.resolve().parents] if beside is not None else []
    return not Path(name).is_dir() and not any((folder / name / "config.json").is_file() for folder in above)


def short_name(name: str, beside: Optional[Path] = None) -> str:
    """A base model's name to be shown: its id on the Hub, or, of a local folder, the last part."""
    return name if is_hub_id(name, beside) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def usage_text(
    auto_class: Optional[str],
    base: Optional[str],
    adapter: str,
    *,
    num_labels: Optional[int] = None,
    revision: Optional[str] = None,
    subfolder: Optional[str] = None,
    remark: str = "",
    local: bool = False,
    merge: bool = False,
) -> str:
    """What a card says of how an adapter is loaded, with the Python code.

    Args:
        auto_class: the class in transformers that loads the base model; None if there is none.
        base: name of the base model; None if it has none.
        adapter: id on the Hub, or folder.
        num_labels: classes of the head, if the base model's constructor has to be told. The base model may have a head
            of another size, which the adapter's takes the place of.
        revision: of the base model.
        subfolder: where the adapter lies in it.
        remark: a comment on `adapter`.
        local: whether the base model's name is that of a folder, and no id on the Hub.
        merge: whether to show how it is merged.
    """
    options = f', revision="{revision}"' if revision is not None else ""
    options += f", num_labels={num_labels}, ignore_mismatched_sizes=True" if num_labels is not None else ""
    inside = f', subfolder="{subfolder}"' if subfolder is not None else ""
    known = auto_class is not None and base is not None
    loaded = f'{auto_class}.from_pretrained("{base}"{options})' if known else "...  # the model it was made for"
    lines = [
        "import peft_learners  # first: it makes the adapter's type known to PEFT",
        "from peft import PeftModel",
        *([f"from transformers import {auto_class}"] if known else []),
        "",
        f"base = {loaded}{'  # a folder of this name' if known and local else ''}",
        f'model = PeftModel.from_pretrained(base, "{adapter}"{inside}){f"  # {remark}" if remark else ""}',
        *(["merged = model.merge_and_unload()  # a plain transformers model, if you want one"] if merge else []),
    ]
    return "\n".join(["With the package peft-learners installed:\n\n```python", *lines, "```"])


# -- the base model that an adapter needs ----------------------------------------------------------------------------


def auto_class(config: Any, mapping: Optional[Mapping[str, str]] = None) -> Optional[str]:
    """The class in transformers that loads an adapter's base model; None if there is none.

    Args:
        config: the adapter's.
        mapping: the base model's class, in place of the config's `auto_mapping`; only read without a task type.
    """
    if config.task_type is not None:
        return AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    saved = mapping or config.auto_mapping or {}
    return saved.get("base_model_class") if saved.get("parent_library", "").startswith("transformers.") else None


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the values in a saved adapter's file, by name."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def num_labels_in(config: Any, auto_class: Optional[str], shapes: Mapping[str, tuple[int, ...]]) -> Optional[int]:
    """Number of classes of the head in an adapter's file.

    It is the size of the head's last linear layer: the one whose outputs are no other's inputs.

    Args:
        config: the adapter's.
        auto_class: the class of its base model.
        shapes: of the values in the file, by name.

    Returns:
        None if the base model has no head of that kind, or if the shapes leave its size open.
    """
    inside = tuple(f"base_model.model.{name}." for name in config.modules_to_save or ())
    linears = [
        shape
        for name, shape in shapes.items()
        if name.startswith(inside) and name.endswith(".weight") and len(shape) == 2
    ]
    sizes = {outputs for outputs, _ in linears}
    last = sizes - {inputs for _, inputs in linears} or sizes
    return last.pop() if has_labels(auto_class) and len(last) == 1 else None


def has_labels(auto_class: Optional[str]) -> bool:
    """Whether the constructor of a class takes a number of labels."""
    return any(task in (auto_class or "") for task in ("Classification", "QuestionAnswering"))
