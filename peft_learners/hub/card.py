"""Model cards: what the cards of PEFT, transformers and Trainer lack, or have wrong, for an adapter of this package.

`PeftModel.push_to_hub` replaces PEFT's card by one of transformers', and Trainer's own card loses its tags to PEFT. So
a PeftModel that saves an adapter of ours gets methods of its own for the two calls that end in a card (`attach`). No
class is touched, and a merged or unloaded model knows nothing of it.
"""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import peft
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig, PeftModel
from torch import nn

from .._version import __version__
from ..config import PhasedConfig

CARD = "README.md"
TAG = "peft-learners"
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_ROOT = "base_model.model."
_NAMES = {"learner": "Learner", "far": "FAR", "nas_lora": "NAS-LoRA", "bottleneck": "bottleneck"}
_BASE_TAG = "base_model:adapter:"
_IMPORT = "import peft_learners"
_VERSIONS = "### Framework versions"
_BY_TRAINER = "the information the Trainer had access to"
_BY_TRANSFORMERS = "This is the model card of a 🤗 transformers model that has been pushed on the Hub"
_BY_US = "<!-- Written when the adapter was saved. Complete it, then remove this comment. -->"
_UNFILLED_START = re.compile(r"(## How to Get Started with the Model\n[^#]*?)\[More Information Needed\]")


# -- names and code --------------------------------------------------------------------------------------------------


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
    return not Path(name).is_dir() and not any(os.path.isfile(folder / name / "config.json") for folder in above)


def short_name(name: str, beside: Optional[Path] = None) -> str:
    """A base model's name to be shown: its id on the Hub, or, of a local folder, the last part."""
    return name if is_hub_id(name, beside) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def loading_code(
    auto_class: Optional[str],
    base: Optional[str],
    adapter: str,
    *,
    num_labels: Optional[int] = None,
    revision: Optional[str] = None,
    subfolder: Optional[str] = None,
    remark: str = "",
    merge: bool = False,
) -> str:
    """Python code that loads an adapter.

    Args:
        auto_class: the class in transformers that loads the base model; None if there is none.
        base: name of the base model; None if it has none.
        adapter: id on the Hub, or folder.
        num_labels: classes of the head, if the base model's constructor has to be told. The base model may have a head
            of another size, which the adapter's takes the place of.
        revision: of the base model.
        subfolder: where the adapter lies in it.
        remark: a comment on `adapter`.
        merge: whether to show how it is merged.
    """
    options = f', revision="{revision}"' if revision is not None else ""
    options += f", num_labels={num_labels}, ignore_mismatched_sizes=True" if num_labels is not None else ""
    inside = f', subfolder="{subfolder}"' if subfolder is not None else ""
    known = auto_class is not None and base is not None
    loaded = f'{auto_class}.from_pretrained("{base}"{options})' if known else "...  # the model it was made for"
    lines = [
        f"{_IMPORT}  # first: it makes the adapter's type known to PEFT",
        "from peft import PeftModel",
        *([f"from transformers import {auto_class}"] if known else []),
        "",
        f"base = {loaded}",
        f'model = PeftModel.from_pretrained(base, "{adapter}"{inside}){f"  # {remark}" if remark else ""}',
        *(["merged = model.merge_and_unload()  # a plain transformers model, if you want one"] if merge else []),
    ]
    return "\n".join(lines)


def with_usage(text: str, usage: str) -> str:
    """A card's text with the loading lines in their place; as it is if it imports the package already."""
    if _IMPORT in text:
        return text
    if _UNFILLED_START.search(text):
        return _UNFILLED_START.sub(lambda match: match[1] + usage, text, count=1)
    section, next_heading = f"## Use\n\n{usage}\n", "\n## Model description\n"
    if _BY_TRAINER in text and next_heading in text:
        return text.replace(next_heading, f"\n{section}{next_heading}", 1)
    return f"{text.rstrip()}\n\n{section}" if text.strip() else f"\n{section}"


def usage_text(code: str) -> str:
    """What a card says around the code."""
    return f"With the package peft-learners installed:\n\n```python\n{code}\n```"


# -- the methods of one object ---------------------------------------------------------------------------------------


class _OwnMethod:
    """A method that one PeftModel has in its `__dict__`. It holds the model weakly, and is copied and pickled with it.

    Attributes:
        repo_id: where Trainer is about to push the model, if it said so.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = weakref.ref(model)
        self.repo_id: str | None = None

    def model(self) -> PeftModel:
        model = self._model()
        if model is None:
            raise ReferenceError(
                "This is a shallow copy of a PeftModel that is gone: make it with copy.deepcopy(model) instead."
            )
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model(), "repo_id": self.repo_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])
        self.repo_id = state["repo_id"]


class _CreateOrUpdateModelCard(_OwnMethod):
    def __call__(self, output_dir: str) -> None:
        write_card(self.model(), output_dir, self.repo_id)


class _UploadModifiedFiles(_OwnMethod):
    def __call__(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        warn_of_local_base(model)
        write_card(model, working_dir, repo_id, publish=True)
        method: Any = type(model)._upload_modified_files
        return method(model, working_dir, repo_id, *args, **kwargs)


_METHODS: dict[str, type[_OwnMethod]] = {
    "create_or_update_model_card": _CreateOrUpdateModelCard,
    "_upload_modified_files": _UploadModifiedFiles,
}


def attach(model: nn.Module, config: Optional[PhasedConfig] = None) -> None:
    """Let the cards of a PeftModel be completed from now on. Nothing is done to other models, nor twice.

    Args:
        model: what an adapter is saved from.
        config: of that adapter. PEFT wrote the card of the first save already, and comes to the config last: it
            completes that card (`complete_saved`).
    """
    if not isinstance(model, PeftModel):
        return
    for name, method in _METHODS.items():
        own = vars(model).get(name)
        if hasattr(type(model), name) and not (isinstance(own, method) and own._model() is model):
            object.__setattr__(model, name, method(model))
            if config is not None:
                config.__dict__["_saved_by"] = weakref.ref(model)


def complete_saved(config: PhasedConfig, folder: str) -> None:
    """Complete the card that PEFT wrote in a save that has come to the adapter's config."""
    saved_by = config.__dict__.pop("_saved_by", None)
    model = saved_by() if saved_by is not None else None
    if model is None:
        return
    name = next((name for name, known in model.peft_config.items() if known is config), "default")
    root = Path(folder) if name == "default" else Path(folder).parent
    if (root / CARD).is_file():
        card = ModelCard.load(root / CARD)
        _complete(card, model, root.resolve().name)
        card.save(root / CARD)


def before_push(model: Any, output_dir: str, repo_id: Optional[str]) -> None:
    """Called when Trainer begins a push, of the end or of a checkpoint (for which it writes no card).

    Args:
        model: Trainer's.
        output_dir: what will be uploaded.
        repo_id: as far as the user gave it.
    """
    if not isinstance(model, PeftModel) or not _our_configs(model):
        return
    attach(model)
    whole = repo_id if repo_id is not None and "/" in repo_id else None
    vars(model)["create_or_update_model_card"].repo_id = whole
    warn_of_local_base(model)
    write_card(model, output_dir, whole, publish=True)


def warn_of_local_base(model: PeftModel) -> None:
    """Warn if an adapter's config, which is about to be uploaded, names a local folder as its base model."""
    for name, config in _our_configs(model).items():
        base = config.base_model_name_or_path
        if base and not is_hub_id(base):
            warnings.warn(
                f"The adapter_config.json that is pushed names the local folder {base!r} as the base model, which "
                "nobody else has. If that model is on the Hub, say so before you push: "
                f'model.peft_config[{name!r}].base_model_name_or_path = "OWNER/NAME"',
                stacklevel=2,
            )


# -- the card --------------------------------------------------------------------------------------------------------


def write_card(model: PeftModel, folder: str, repo_id: Optional[str] = None, *, publish: bool = False) -> None:
    """Write the README.md of an adapter, or complete the one that is there.

    Args:
        model: a PeftModel with an adapter of this package.
        folder: where the README.md is, or goes.
        repo_id: the repository that the folder is pushed to, if known.
        publish: whether it is uploaded next: then it names no local folder, and keeps its text but for loading lines
            that are missing.
    """
    path = Path(folder) / CARD
    before = ModelCard.load(path) if path.is_file() else None
    type(model).create_or_update_model_card(model, folder)
    card = ModelCard.load(path)
    if before is not None and publish and not is_boilerplate(before.text):
        card.text = before.text
    by_trainer = _BY_TRAINER in card.text
    _complete(
        card,
        model,
        Path(folder).resolve().name,
        before=before.data if before is not None else None,
        repo_id=repo_id if publish or by_trainer else None,
        publish=publish or by_trainer,
    )
    card.save(path)


def _complete(
    card: ModelCard,
    model: PeftModel,
    folder_name: str,
    *,
    before: Any = None,
    repo_id: Optional[str] = None,
    publish: bool = False,
) -> None:
    configs = _our_configs(model)
    if not configs:  # since deleted
        return
    active = model.active_adapter
    name = active if isinstance(active, str) and active in configs else next(iter(configs))
    config, root = configs[name], model.get_base_model()
    methods = sorted({method_of(config) for config in configs.values()})
    own = getattr(root, "name_or_path", None)  # where transformers loaded the model from
    base = next(
        (b for b in (config.base_model_name_or_path, own, getattr(before, "base_model", None)) if is_hub_id(b)), None
    )

    data: Any = card.data
    data["library_name"] = "peft"
    if base is not None:
        data["base_model"], data["base_model_relation"] = base, "adapter"
    elif publish or not data.get("base_model"):
        data.pop("base_model", None)
        data.pop("base_model_relation", None)
    tags = {*(data.tags or ()), *(getattr(before, "tags", None) or ()), TAG, *methods}
    tags = {tag for tag in tags if not tag.startswith(_BASE_TAG)} | ({_BASE_TAG + base} if base else set())
    data.tags = sorted(tags)

    known = base or config.base_model_name_or_path or own
    shown = short_name(known) if known else None
    label = shown or type(root).__name__
    code = loading_code(
        auto_class(config, root),
        shown,
        repo_id or folder_name,
        num_labels=_num_labels(config, root),
        revision=config.revision,
        subfolder=name if name != "default" else None,
        remark="" if repo_id else "this folder, or its id on the Hub",
    )
    if is_boilerplate(card.text):
        kinds = " and ".join(_NAMES[method] for method in methods)
        card.text = _own_text((repo_id or folder_name).rpartition("/")[2], f"A {kinds} adapter of `{label}`", code)
    if publish and own is not None and not is_hub_id(own):  # Trainer takes the name of a folder that is gone for an id
        card.text = card.text.replace(f"[{own}](https://huggingface.co/{own})", f"`{label}`")
    card.text = with_usage(card.text, usage_text(code))


def _own_text(title: str, what: str, code: str) -> str:
    about = f"{what}, made with peft-learners, a plugin for PEFT."
    versions = f"- PEFT {peft.__version__}\n- peft-learners {__version__}"
    return f"\n{_BY_US}\n\n# {title}\n\n{about}\n\n## Use\n\n{usage_text(code)}\n\n{_VERSIONS}\n\n{versions}\n"


def is_automatic(text: str) -> bool:
    """Whether a card's text was made when the adapter was saved or pushed, and says nothing of its own."""
    return _BY_US in text or is_boilerplate(text)


def is_boilerplate(text: str) -> bool:
    """Whether a card's text is huggingface_hub's template with nothing filled in."""
    lines = text.partition(_VERSIONS)[0].splitlines()
    return _kept_lines(lines) == _template_lines()


@lru_cache
def _template_lines() -> tuple[str, ...]:
    return _kept_lines(ModelCard.from_template(ModelCardData()).text.splitlines())


def _kept_lines(lines: list[str]) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith(_BY_TRANSFORMERS))


def _our_configs(model: PeftModel) -> dict[str, PhasedConfig]:
    return {name: config for name, config in model.peft_config.items() if isinstance(config, PhasedConfig)}


def method_of(config: PeftConfig) -> str:
    """learner, far, nas_lora or bottleneck."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


# -- the base model that an adapter needs ----------------------------------------------------------------------------


def auto_class(config: PeftConfig, root: Optional[nn.Module] = None) -> Optional[str]:
    """The class in transformers that loads an adapter's base model; None if there is none.

    Args:
        root: the base model, where it is at hand. PEFT saves its class in the configs that have no task type.
    """
    if config.task_type is not None:
        return AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    saved = config.auto_mapping or {}
    name = type(root).__name__ if root is not None else saved.get("base_model_class")
    library = type(root).__module__ if root is not None else saved.get("parent_library") or ""
    return name if library.startswith("transformers.") else None


def num_labels_in(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> Optional[int]:
    """Number of classes of the head in an adapter's file.

    It is the size of the head's last linear layer: the one whose outputs are no other's inputs.

    Args:
        shapes: of the values in the file, by name.

    Returns:
        None if the base model has no head of that kind, or if the shapes leave its size open.
    """
    inside = tuple(f"{_ROOT}{name}." for name in config.modules_to_save or ())
    linears = [
        shape
        for name, shape in shapes.items()
        if name.startswith(inside) and name.endswith(".weight") and len(shape) == 2
    ]
    sizes = {outputs for outputs, _ in linears}
    last = sizes - {inputs for _, inputs in linears} or sizes
    return last.pop() if _has_labels(auto_class(config)) and len(last) == 1 else None


def _num_labels(config: PeftConfig, root: nn.Module) -> Optional[int]:
    known = _has_labels(auto_class(config, root))
    return getattr(getattr(root, "config", None), "num_labels", None) if known else None


def _has_labels(class_name: Optional[str]) -> bool:
    return any(task in (class_name or "") for task in ("Classification", "QuestionAnswering"))
