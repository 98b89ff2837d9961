"""Write the model card (README.md) of a saved Learner, FAR, NAS-LoRA or bottleneck adapter.

    python -m scripts.model_card ADAPTER_FOLDER [--results results.json] [--picture nodes.png] [--base_model HUB_ID]

What the card says comes from the adapter's files and, where given, from a results file of `train_glue.py`; a file of
another run is refused. An earlier README.md in the folder is replaced.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig
from safetensors import safe_open

from peft_learners.hub.card import auto_class, is_hub_id, loading_code, num_labels_in, short_name, usage_text
from scripts.glue import data as glue_data
from scripts.glue import run_record
from scripts.model_card_methods import (
    CARD_METHODS,
    Config,
    found_before,
    kept_text,
    own_fields,
    recorded_fields,
    table,
    trained_by_file,
)

#: Remark on an adapter's name in a card that was written before it was pushed.
HERE = "this folder, or its id on the Hub"
#: Of all cards, in Jinja.
TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"
#: Fields that training writes, or that are no settings of the method.
NO_SETTINGS = {f.name for f in fields(PeftConfig)} | {
    *("completed_phases", "phase_first_steps", "reconfigured", "architecture", "pruned_rounds")
}
#: Fields that are completed from the model's structure.
FOUND = ("target_modules", "priming_modules", "modules_to_save", "ffn_modules", "bias_modules")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter, as far as a card tells of it.

    Attributes:
        folder: where it lies.
        method: learner, far, nas_lora or bottleneck.
        config: its config.
        shapes: shapes of its values by name.
        base: name of its base model, to be shown.
        base_id: the base model's id on the Hub, if it has one.
    """

    folder: Path
    method: str
    config: Config
    shapes: dict[str, tuple[int, ...]]
    base: str
    base_id: Optional[str]

    @property
    def folder_name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """The folder's name; `train_glue.py` calls all of them "adapter", in a folder of the run's name."""
        return self.folder_name if self.folder_name != "adapter" else self.folder.resolve().parent.name


def read_adapter(folder: Path, base_model: Optional[str] = None) -> Adapter:
    """The adapter in a folder.

    Args:
        folder: of the adapter.
        base_model: id of its base model on the Hub, in place of the name in its config.

    Raises:
        ValueError: the folder holds no adapter of this package, or the base model is unknown.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"--base_model must be the id of a model on the Hub (OWNER/NAME), got {base_model!r}.")
    config = run_record.read_json(folder / "adapter_config.json") if folder.is_dir() else None
    weights = folder / "adapter_model.safetensors"
    kind = str((config or {}).get("peft_type"))
    if config is None or not weights.is_file() or kind.lower() not in CARD_METHODS:
        raise ValueError(
            f"{folder} must be the folder of a saved Learner, FAR, NAS-LoRA or bottleneck adapter, but "
            f"{_fault(folder, config)}."
        )
    name = base_model or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"The config in {folder} names no base model: give it with --base_model.")
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    read: Any = CARD_METHODS[kind.lower()].config.from_pretrained(str(folder))
    beside = folder if base_model is None else None
    base_id = name if is_hub_id(name, beside) else None
    return Adapter(folder, kind.lower(), read, shapes, short_name(name, beside), base_id)


def _fault(folder: Path, config: Optional[Mapping[str, Any]]) -> str:
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "there is no such folder"
    if config is None:
        there = (folder / "adapter_config.json").is_file()
        return "its adapter_config.json is damaged" if there else "it holds no adapter_config.json"
    kind = str(config.get("peft_type"))
    known = kind.lower() in CARD_METHODS
    return f"it holds {'no adapter_model.safetensors' if known else f'an adapter of type {kind}'}"


def read_results(file: Path, adapter: Adapter) -> dict[str, Any]:
    """What `train_glue.py` recorded about the run that made the adapter.

    Raises:
        ValueError: the file holds no finished run, or one of another adapter.
    """
    results = run_record.read_json(file)
    if results is None or not results.get("finished") or results.get("schema_version") != run_record.SCHEMA_VERSION:
        raise ValueError(f"{file} must be the results file of a finished run of train_glue.py.")
    given, settings = recorded_fields(adapter.method, results["config"]), adapter.config.to_dict()
    shared = [name for name in given if name in settings]
    here = {"method": adapter.method, **{name: settings[name] for name in shared}}
    there = {"method": results["method"], **{name: given[name] for name in shared}}
    if changed := run_record.differences(there, here):
        raise ValueError(f"{file} is of another adapter than {adapter.folder} ({'; '.join(changed)}).")
    if results["model"].rpartition("/")[2].lower() != adapter.base.rpartition("/")[2].lower():
        raise ValueError(f"{file} is of a run on {results['model']}, the adapter's base model is {adapter.base}.")
    return results


# -- what the card says --------------------------------------------------------------------------------------------


def task_name(results: Mapping[str, Any]) -> str:
    """The task as people write it: CoLA, STS-B."""
    return glue_data.find_task(results["task"]).folder


def metrics_of(results: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """`(dev split, metric, value)` of the run's end."""
    splits = {suffix: split for suffix, split, _ in glue_data.find_task(results["task"]).dev_splits}
    rows = []
    for key, value in results["final"].items():
        name = key.removeprefix("eval_")
        suffix = next((s for s in splits if s and name.startswith(f"{s}_")), "")
        name = name.removeprefix(f"{suffix}_")
        if name != "loss" and isinstance(value, (int, float)):
            rows.append((splits.get(suffix, "validation"), name, float(value)))
    return rows


def card_data(adapter: Adapter, results: Optional[Mapping[str, Any]], title: str) -> ModelCardData:
    """The card's header."""
    evaluations = metrics = None
    if results is not None:
        task = glue_data.find_task(results["task"])
        evaluations = [
            EvalResult(
                task_type="text-classification",
                dataset_type=glue_data.HUB_DATASET,
                dataset_name=f"GLUE {task.folder}",
                dataset_config=task.name,
                dataset_split=split,
                metric_type=metric,
                metric_value=value,
            )
            for split, metric, value in metrics_of(results)
        ]
        metrics = list(dict.fromkeys(metric for _, metric, _ in metrics_of(results)))
    return ModelCardData(
        base_model=adapter.base_id,
        base_model_relation="adapter" if adapter.base_id else None,
        library_name="peft",
        pipeline_tag="text-classification" if adapter.config.task_type == "SEQ_CLS" else None,
        tags=["peft", "peft-learners", adapter.method],
        datasets=[glue_data.HUB_DATASET] if results is not None else None,
        metrics=metrics,
        model_name=title if results is not None else None,
        eval_results=evaluations,
    )


def settings_text(adapter: Adapter) -> str:
    """The settings that differ from the defaults, and below them the main ones that don't."""
    config, rows, usual = adapter.config, [], []
    for entry in fields(config):
        value, default = getattr(config, entry.name), getattr(type(config)(), entry.name)
        if value == default and entry.name in own_fields(adapter.method):
            usual.append(f"`{entry.name}={value!r}`")
        if entry.name in NO_SETTINGS or value == default:
            continue
        value = sorted(value) if isinstance(value, (set, list)) and entry.name != "ffn_modules" else value
        found = " (unless given, found from the model's structure)" if entry.name in FOUND else ""
        rows.append([f"`{entry.name}`", f"`{value!r}`{found}"])
    text = table([f"field of `{type(config).__name__}`", "value"], rows) + "\n\n" if rows else ""
    among = f", among them {', '.join(usual)}" if usual else ""
    return f"{text}All {'others' if rows else 'fields'} have their defaults{among}."


def phase_rows(adapter: Adapter, results: Optional[Mapping[str, Any]]) -> list[list[str]]:
    """Name, optimizer steps and trained parameters of each phase, from the results or, without them, the file."""
    if results is not None:
        return [[p["name"], f"{p['steps']:,}", f"{p['trained_parameters']:,}"] for p in results["phases"]]
    phases = [phase.name for phase in adapter.config.outline().phases]
    phases = phases[-1:] if found_before(adapter.config) else phases
    firsts = adapter.config.phase_first_steps or {}
    counts = trained_by_file(adapter.config, adapter.shapes)
    rows = []
    for phase, after in zip(phases, [*phases[1:], None], strict=True):
        known = phase in firsts and after in firsts
        steps = f"{firsts[phase]:,} to {firsts[after]:,}" if known and after else f"from {firsts.get(phase, '?')}"
        count = counts.get(phase)
        rows.append([phase, steps, f"{count:,}" if count is not None else "not in the file"])
    return rows


def training_text(adapter: Adapter, results: Optional[Mapping[str, Any]]) -> str:
    head = ["phase", "optimizer steps", "trained parameters"]
    size = run_record.saved_bytes(adapter.folder)
    text = [table(head, phase_rows(adapter, results)), "", f"The file of weights has {size / 1e6:.2f} MB."]
    if not adapter.config.phases_complete:
        text.append("It was saved before its last phase began: as it is, it is not what the method makes.")
    if results is not None:
        config = results["config"]
        rows = results["rows"].get("train")
        text.append(
            f"Trained on {rows:,} rows of GLUE's {task_name(results)}: {config['num_train_epochs']:g} epochs, "
            f"batches of {config['total_batch_size']}, {config['optim']}, learning rate {config['learning_rate']:g} "
            f"({config['lr_scheduler_type']}), seed {config['seed']}."
        )
    return "\n".join(text)


def usage(adapter: Adapter, repo_id: Optional[str] = None) -> str:
    """Code that loads the adapter from the Hub, or in a process whose folder holds it."""
    config, (where, remark) = adapter.config, (repo_id, "") if repo_id else (adapter.folder_name, HERE)
    code = loading_code(
        auto_class(config),
        adapter.base,
        where,
        num_labels=num_labels_in(config, adapter.shapes),
        revision=config.revision,
        remark=remark,
        merge=not config.unmergeable,
    )
    return usage_text(code)


def results_text(results: Mapping[str, Any]) -> str:
    """The metrics at the run's end, and on what."""
    rows = [
        [split, f"{results['rows'].get(_rows_key(results, split), 0):,}", metric, f"{100 * value:.1f}"]
        for split, metric, value in metrics_of(results)
    ]
    labels = ", ".join(f"{i}: {name}" for i, name in enumerate(glue_data.find_task(results["task"]).labels))
    classes = f" Classes: {labels}." if labels else " One output, the score."
    return f"{table(['split', 'rows', 'metric', 'value x 100'], rows)}\n\nAt the end of the run.{classes}"


def _rows_key(results: Mapping[str, Any], split: str) -> str:
    suffixes = {name: suffix for suffix, name, _ in glue_data.find_task(results["task"]).dev_splits}
    return f"dev_{suffixes.get(split, '')}".rstrip("_")


def limits_text(adapter: Adapter, results: Optional[Mapping[str, Any]]) -> str:
    """What the card must not be read as."""
    if results is None:
        return (
            "No results came with this adapter: this card says nothing about how well it does anything, on its own "
            "task or on others."
        )
    config = results["config"]
    lines = [
        f"- **No comparison of methods.** It is one run with one seed ({config['seed']}): it says nothing about the "
        "spread over seeds, nor how others would do at settings of their own.",
        f"- **One task.** The values are those of {task_name(results)}'s dev set. They say nothing about other "
        "data, and they are not values of GLUE's test set.",
        "- **No measurement of speed or memory.**",
    ]
    if config.get("load_best_model_at_end"):
        lines.append(
            "- **Chosen on the dev set**: the best of several evaluations was kept, so its value is too good."
        )
    for name, part in (("max_train_samples", "training"), ("max_eval_samples", "dev")):
        if config.get(name):
            lines.append(f"- **Cut data**: only the first {config[name]:,} rows of the {part} set were used.")
    return "\n".join(lines)


def card(
    adapter: Adapter,
    results: Optional[Mapping[str, Any]] = None,
    picture: Optional[str] = None,
    repo_id: Optional[str] = None,
) -> ModelCard:
    """The whole card.

    Args:
        adapter: what it is of.
        results: of the run that made it.
        picture: name of a picture in the adapter's folder.
        repo_id: where the adapter is pushed to.
    """
    method, title = CARD_METHODS[adapter.method], repo_id.rpartition("/")[2] if repo_id else adapter.title
    made = ModelCard.from_template(
        card_data(adapter, results, title),
        template_path=str(TEMPLATE),
        title=title,
        kind=method.adapter,
        base=adapter.base,
        task=task_name(results) if results is not None else None,
        about=method.about,
        usage=usage(adapter, repo_id),
        results=results_text(results) if results is not None else None,
        training=training_text(adapter, results),
        kept=kept_text(adapter.folder, adapter.config, adapter.shapes),
        settings=settings_text(adapter),
        picture=picture,
        limits=limits_text(adapter, results),
        versions=", ".join(f"{name} {v}" for name, v in results["versions"].items() if v) if results else None,
    )
    made.text = made.text.rstrip() + "\n"
    return made


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Write the README.md of an adapter's folder.")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_FOLDER", help="folder of a saved adapter")
    parser.add_argument("--results", type=Path, help="results file of the run of train_glue.py that made it")
    parser.add_argument("--picture", type=Path, help="a picture, copied into the folder and shown")
    parser.add_argument("--base_model", help="the base model's Hub id (default: as in the adapter's config)")
    args = parser.parse_args(argv)
    adapter = read_adapter(args.adapter, args.base_model)
    results = read_results(args.results, adapter) if args.results else None
    if args.picture and args.picture.resolve() != (args.adapter / args.picture.name).resolve():
        shutil.copyfile(args.picture, args.adapter / args.picture.name)
    written = args.adapter / "README.md"
    card(adapter, results, args.picture.name if args.picture else None).save(written)
    if adapter.base_id is None:
        print(
            f"The adapter was trained on a local folder; the card calls the base model {adapter.base!r}. If it is on "
            "the Hub, give its id: --base_model OWNER/NAME.",
            file=sys.stderr,
        )
    print(f"-> {written}")


if __name__ == "__main__":
    main()
