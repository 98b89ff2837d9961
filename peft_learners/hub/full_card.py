"""The whole model card of a saved adapter: what it is, how it was trained, what came out, how it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig
from safetensors import SafetensorError

from ..config import PhasedConfig
from ..registry import methods
from .short_card import (
    CARD,
    CONFIG,
    HERE,
    TAG,
    WEIGHTS,
    auto_class,
    first_sentence,
    is_hub_id,
    num_labels_in,
    shapes_in,
    short_name,
    usage_text,
)


@dataclass(frozen=True)
class Results:
    """What a card tells of the training that made an adapter.

    Attributes:
        evaluations: values, with the metrics and data that they are of: they go into the card's header.
        text: the same for readers, in Markdown. None: a table of `evaluations`.
        task: what the adapter does, as in "for GLUE's MRPC".
        phases: name, optimizer steps and trained parameters of each phase. Empty: what the adapter's file tells.
        training: sentences on data and settings.
        limits: what the results must not be read as, in Markdown.
        versions: of the packages that were used.
    """

    evaluations: Sequence[EvalResult] = ()
    text: Optional[str] = None
    task: Optional[str] = None
    phases: Sequence[tuple[str, int, int]] = ()
    training: Optional[str] = None
    limits: Optional[str] = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """A saved adapter, as far as a card tells of it.

    Attributes:
        folder: where it lies.
        config: its config.
        shapes: shapes of its values by name.
        base: name of its base model, to be shown.
        base_id: the base model's id on the Hub, if it has one.
    """

    folder: Path
    config: PhasedConfig
    shapes: dict[str, tuple[int, ...]]
    base: str
    base_id: Optional[str]

    @property
    def folder_name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """The folder's name; one that is called "adapter" says less than the folder around it."""
        return self.folder_name if self.folder_name != "adapter" else self.folder.resolve().parent.name


def read_adapter(folder: Union[str, Path], base_model: Optional[str] = None) -> Adapter:
    """The adapter in a folder.

    Args:
        folder: of the adapter.
        base_model: id of its base model on the Hub, in place of the name in its config.

    Raises:
        ValueError: the folder holds no adapter of this package, or the base model is unknown.
    """
    folder = Path(folder)
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"`base_model=` must be the id of a model on the Hub (OWNER/NAME), got {base_model!r}.")
    if fault := _fault(folder):
        *names, last = (cls.display_name or cls.__name__ for cls in methods().values())
        raise ValueError(f"{folder} must be the folder of a saved {', '.join(names)} or {last} adapter, but {fault}.")
    config: Any = PeftConfig.from_pretrained(str(folder))
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"The config in {folder} names no base model: give it with `base_model=`.")
    try:
        shapes = shapes_in(folder)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}).") from error
    beside = folder if base_model is None else None
    return Adapter(folder, config, shapes, short_name(name, beside), name if is_hub_id(name, beside) else None)


def _fault(folder: Path) -> Optional[str]:
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "there is no such folder"
    if not (folder / CONFIG).is_file():
        return f"it holds no {CONFIG}"
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError):
        return f"its {CONFIG} is damaged"
    if str(kind).lower() not in methods():
        return f"it holds an adapter of type {kind}"
    return None if (folder / WEIGHTS).is_file() else f"it holds no {WEIGHTS}"


def write_card(
    folder: Union[str, Path],
    *,
    base_model: Optional[str] = None,
    results: Optional[Results] = None,
    picture: Union[str, Path, None] = None,
) -> ModelCard:
    """Write the card of a saved adapter into its folder, in place of an earlier README.md.

    Args:
        folder: of the adapter.
        base_model: id of its base model on the Hub, in place of the name in its config.
        results: what is known of its training.
        picture: is copied into the folder and shown.

    Returns:
        The card.

    Raises:
        ValueError: the folder holds no adapter of this package, or the base model is unknown.
    """
    adapter, name = read_adapter(folder, base_model), Path(picture).name if picture else None
    if picture and Path(picture).resolve() != (adapter.folder / str(name)).resolve():
        shutil.copyfile(picture, adapter.folder / str(name))
    card = make_card(adapter, results, name)
    card.save(adapter.folder / CARD)
    return card


def make_card(
    adapter: Adapter, results: Optional[Results] = None, picture: Optional[str] = None, repo_id: Optional[str] = None
) -> ModelCard:
    """The card of an adapter.

    Args:
        adapter: what it is of.
        results: what is known of its training.
        picture: name of a picture beside the card.
        repo_id: where the adapter is pushed to.
    """
    limits = results.limits if results is not None else _NO_RESULTS
    config, title = adapter.config, repo_id.rpartition("/")[2] if repo_id else adapter.title
    results = results or Results()
    sections = {
        "Use": usage(adapter, repo_id),
        "Results": _results_text(results),
        "Training": _training_text(adapter, results),
        **config.card_sections(adapter.shapes),
        "Settings": _settings_text(config),
        "Picture": f"![Picture of the adapter]({picture})" if picture else None,
        "What this is not": limits,
        "Versions": ", ".join(f"{name} {v}" for name, v in results.versions.items()),
    }
    task = f" for {results.task}" if results.task else ""
    body = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    card = ModelCard("---\n{}\n---\n")
    card.data = _header(adapter, results, title)
    about = f"{first_sentence(config, adapter.base, task)} {config.about}".rstrip()
    card.text = "\n" + "\n\n".join([f"# {title}", about, *body]) + "\n"
    return card


_NO_RESULTS = (
    "No results came with this adapter: this card says nothing about how well it does anything, on its own task or on "
    "others."
)


def _header(adapter: Adapter, results: Results, title: str) -> ModelCardData:
    found = results.evaluations
    return ModelCardData(
        base_model=adapter.base_id,
        base_model_relation="adapter" if adapter.base_id else None,
        library_name="peft",
        pipeline_tag="text-classification" if adapter.config.task_type == "SEQ_CLS" else None,
        tags=["peft", TAG, adapter.config.method],
        datasets=list(dict.fromkeys(result.dataset_type for result in found)) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in found)) or None,
        model_name=title if found else None,
        eval_results=list(found) or None,
    )


def usage(adapter: Adapter, repo_id: Optional[str] = None) -> str:
    """How the adapter is loaded from the Hub, or in a process whose folder holds it."""
    config, kind = adapter.config, auto_class(adapter.config)
    return usage_text(
        kind,
        adapter.base,
        repo_id or adapter.folder_name,
        num_labels=num_labels_in(config, kind, adapter.shapes),
        revision=config.revision,
        remark="" if repo_id else HERE,
        local=adapter.base_id is None,
        merge=not config.unmergeable,
    )


def _results_text(results: Results) -> Optional[str]:
    rows = [(e.dataset_split or "", e.metric_name or e.metric_type, str(e.metric_value)) for e in results.evaluations]
    return results.text or (table(["split", "metric", "value"], rows) if rows else None)


def _training_text(adapter: Adapter, results: Results) -> str:
    if results.phases:
        rows = [[name, f"{steps:,}", f"{trained:,}"] for name, steps, trained in results.phases]
    else:
        rows = _phases_by_file(adapter)
    size = (adapter.folder / WEIGHTS).stat().st_size
    text = table(["phase", "optimizer steps", "trained parameters"], rows)
    lines = [text, "", f"The file of weights has {size / 1e6:.2f} MB."]
    if not adapter.config.phases_complete:
        lines.append("It was saved before its last phase began: as it is, it is not what the method makes.")
    if results.training:
        lines.append(results.training)
    return "\n".join(lines)


def _phases_by_file(adapter: Adapter) -> list[list[str]]:
    firsts, counts = adapter.config.phase_first_steps or {}, adapter.config.trained_by_phase(adapter.shapes)
    rows = []
    for (phase, count), after in zip(counts.items(), [*list(counts)[1:], None], strict=True):
        known = phase in firsts and after in firsts
        steps = f"{firsts[phase]:,} to {firsts[str(after)]:,}" if known else f"from {firsts.get(phase, '?')}"
        rows.append([phase, steps, f"{count:,}" if count is not None else "not in the file"])
    return rows


def _settings_text(config: PhasedConfig) -> str:
    """The settings that differ from the defaults, and below them the method's own that don't."""
    default, common = type(config)(), {f.name for f in fields(PhasedConfig)}
    rows, usual = [], []
    for entry in fields(config):
        name, value = entry.name, getattr(config, entry.name)
        if name in _OF_PEFT or "Written " in entry.metadata.get("help", ""):  # by training
            continue
        if value != getattr(default, name):
            by_structure = "modules" in name and name != "exclude_modules"
            found = " (unless given, found from the model's structure)" if by_structure else ""
            names = isinstance(value, (set, list)) and all(isinstance(v, str) for v in value)
            rows.append([f"`{name}`", f"`{sorted(value) if names else value!r}`{found}"])
        elif name not in common and value is not None and value != {}:
            usual.append(f"`{name}={value!r}`")
    text = table([f"field of `{type(config).__name__}`", "value"], rows) + "\n\n" if rows else ""
    among = f", among them {', '.join(usual)}" if usual else ""
    return f"{text}All {'others' if rows else 'fields'} have their defaults{among}."


_OF_PEFT = {f.name for f in fields(PeftConfig)}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
