"""The whole model card of a saved adapter: what it is, how it was trained, what came out, how it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from peft import PeftConfig
from safetensors import SafetensorError

from ..config import PhasedConfig
from ..registry import methods
from .short_card import (
    CARD,
    CONFIG,
    HERE,
    WEIGHTS,
    auto_class,
    fill_header,
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
        base: name of its base model, to be shown; "" if nothing tells it.
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


def read_adapter(folder: Union[str, Path], base_model: Optional[str] = None, *, base_needed: bool = True) -> Adapter:
    """The adapter in a folder.

    Args:
        folder: of the adapter.
        base_model: id of its base model on the Hub, in place of the name in its config.
        base_needed: whether an adapter that names no base model is refused.

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
    name = base_model or config.base_model_name_or_path or ""
    if not name and base_needed:
        raise ValueError(f"The config in {folder} names no base model: give it with `base_model=`.")
    try:
        shapes = shapes_in(folder)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}).") from error
    beside = folder if base_model is None else None
    shown = short_name(name, beside) if name else ""
    return Adapter(folder, config, shapes, shown, name if is_hub_id(name, beside) else None)


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
    """Write the card of a saved adapter into its folder.

    It replaces the text of an earlier README.md. Of its header it keeps what saving and the user wrote there: tags,
    `pipeline_tag`, license, ...; earlier results go with the text that told of them.

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
    card = make_card(adapter, results, name, header=header_in(adapter.folder / CARD))
    card.save(adapter.folder / CARD)
    return card


def check_picture(picture: Union[str, Path, None]) -> None:
    """Refuse a picture that is not there, before anything is written.

    Raises:
        ValueError: it is no file.
    """
    if picture is not None and not Path(picture).is_file():
        raise ValueError(f"`picture=` must be a file, got {str(picture)!r}.")


def header_in(path: Path) -> Optional[CardData]:
    """The header of a card; None if there is no such file, or none that can be read."""
    try:
        return ModelCard.load(path).data if path.is_file() else None
    except (yaml.YAMLError, ValueError):
        return None


def make_card(
    adapter: Adapter,
    results: Optional[Results] = None,
    picture: Optional[str] = None,
    repo_id: Optional[str] = None,
    header: Optional[CardData] = None,
) -> ModelCard:
    """The card of an adapter.

    Args:
        adapter: what it is of.
        results: what is known of its training.
        picture: name of a picture beside the card.
        repo_id: where the adapter is pushed to.
        header: of an earlier card, of which all but the results is kept.
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
    card.data = _header(adapter, results, title, header)
    about = f"{first_sentence(config, adapter.base, task)} {config.about}".rstrip()
    card.text = "\n" + "\n\n".join([f"# {title}", about, *body]) + "\n"
    return card


_NO_RESULTS = (
    "No results came with this adapter: this card says nothing about how well it does anything, on its own task or on "
    "others."
)


def _header(adapter: Adapter, results: Results, title: str, before: Optional[CardData]) -> ModelCardData:
    found, config = results.evaluations, adapter.config
    task = str(getattr(config.task_type, "value", config.task_type))
    kept = {key: value for key, value in vars(before or ModelCardData()).items() if key not in _OF_RESULTS}
    data = ModelCardData(**kept)
    data["pipeline_tag"] = data.get("pipeline_tag") or PIPELINES.get(task)
    data["tags"] = ["peft", *(data.get("tags") or ())]
    fill_header(data, config.method, adapter.base_id)
    if found:
        data["datasets"] = list(dict.fromkeys(result.dataset_type for result in found))
        data["metrics"] = list(dict.fromkeys(result.metric_type for result in found))
        data["model_name"], data["eval_results"] = title, list(found)
    return data


#: Keys of a header that tell of results.
_OF_RESULTS = ("model_name", "eval_results", "metrics")
#: The Hub's names of tasks, by PEFT's. Neither has one for SEQ_2_SEQ_LM.
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


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
        found = phases_by_file(adapter)
        rows = [[name, steps, f"{n:,}" if n is not None else "not in the file"] for name, steps, n in found]
    size = (adapter.folder / WEIGHTS).stat().st_size
    text = table(["phase", "optimizer steps", "trained parameters"], rows)
    lines = [text, "", f"The file of weights has {size / 1e6:.2f} MB."]
    if not adapter.config.phases_complete:
        lines.append("It was saved before its last phase began: as it is, it is not what the method makes.")
    if results.training:
        lines.append(results.training)
    return "\n".join(lines)


def phases_by_file(adapter: Adapter) -> list[tuple[str, str, Optional[int]]]:
    """Name, steps and trained parameters of each phase; None where the file does not tell them."""
    firsts, counts = adapter.config.phase_first_steps or {}, adapter.config.trained_by_phase(adapter.shapes)
    rows = []
    for (phase, count), after in zip(counts.items(), [*list(counts)[1:], None], strict=True):
        known = phase in firsts and after in firsts
        steps = f"{firsts[phase]:,} to {firsts[str(after)]:,}" if known else f"from {firsts.get(phase, '?')}"
        rows.append((phase, steps, count))
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
