"""Write the model card (README.md) of an adapter that `scripts.glue.train` made, with the results of its run.

    python -m scripts.glue.card ADAPTER_FOLDER results.json [--picture nodes.png] [--base_model HUB_ID]

`peft-learners card` writes the same card without results, and `peft-learners push` pushes either. A results file of
another run is refused.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import EvalResult

from peft_learners.hub import Results, write_card
from peft_learners.hub.full_card import Adapter, read_adapter, table
from scripts.glue import data, run_record
from scripts.glue.methods import METHODS


def read_results(file: Path, adapter: Adapter) -> Results:
    """What `scripts.glue.train` recorded about the run that made the adapter.

    Raises:
        ValueError: the file holds no finished run, or one of another adapter.
    """
    record = run_record.read_json(file)
    if record is None or not record.get("finished") or record.get("schema_version") != run_record.SCHEMA_VERSION:
        raise ValueError(f"{file} must be the results file of a finished run of scripts.glue.train.")
    method = adapter.config.method
    given, settings = recorded_fields(method, record["config"]), adapter.config.to_dict()
    shared = [name for name in given if name in settings]
    here = {"method": method, **{name: settings[name] for name in shared}}
    there = {"method": record["method"], **{name: given[name] for name in shared}}
    if changed := run_record.differences(there, here):
        raise ValueError(f"{file} is of another adapter than {adapter.folder} ({'; '.join(changed)}).")
    if record["model"].rpartition("/")[2].lower() != adapter.base.rpartition("/")[2].lower():
        raise ValueError(f"{file} is of a run on {record['model']}, the adapter's base model is {adapter.base}.")
    task = data.find_task(record["task"])
    return Results(
        evaluations=[
            EvalResult(
                task_type="text-classification",
                dataset_type=data.HUB_DATASET,
                dataset_name=f"GLUE {task.folder}",
                dataset_config=task.name,
                dataset_split=split,
                metric_type=metric,
                metric_value=value,
            )
            for split, metric, value in metrics_of(record)
        ],
        text=_results_text(record),
        task=f"GLUE's {task.folder}",
        phases=[(phase["name"], phase["steps"], phase["trained_parameters"]) for phase in record["phases"]],
        training=_training_text(record),
        limits=_limits_text(record),
        versions={name: version for name, version in record["versions"].items() if version},
    )


def recorded_fields(method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields as a results file tells them, by the method's own arguments: other names (seed) mean
    something else in the two."""
    own = METHODS[method].arguments
    found = {name.removeprefix("nas_"): arguments[name] for name in own if name in arguments}
    if found.get("parameter_budget", 0) > 1:  # a number of parameters, which the command line reads as a float too
        found["parameter_budget"] = round(found["parameter_budget"])
    return found


def metrics_of(record: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """`(dev split, metric, value)` of the run's end."""
    splits = {suffix: split for suffix, split, _ in data.find_task(record["task"]).dev_splits}
    rows = []
    for key, value in record["final"].items():
        name = key.removeprefix("eval_")
        suffix = next((s for s in splits if s and name.startswith(f"{s}_")), "")
        name = name.removeprefix(f"{suffix}_")
        if name != "loss" and isinstance(value, (int, float)):
            rows.append((splits.get(suffix, "validation"), name, float(value)))
    return rows


def _results_text(record: Mapping[str, Any]) -> str:
    """The metrics at the run's end, and on what."""
    task = data.find_task(record["task"])
    counts = {split: f"dev_{suffix}".rstrip("_") for suffix, split, _ in task.dev_splits}
    rows = [
        [split, f"{record['rows'].get(counts.get(split, 'dev'), 0):,}", metric, f"{100 * value:.1f}"]
        for split, metric, value in metrics_of(record)
    ]
    labels = ", ".join(f"{i}: {name}" for i, name in enumerate(task.labels))
    classes = f" Classes: {labels}." if labels else " One output, the score."
    return f"{table(['split', 'rows', 'metric', 'value x 100'], rows)}\n\nAt the end of the run.{classes}"


def _training_text(record: Mapping[str, Any]) -> str:
    config = record["config"]
    return (
        f"Trained on {record['rows'].get('train'):,} rows of GLUE's {data.find_task(record['task']).folder}: "
        f"{config['num_train_epochs']:g} epochs, batches of {config['total_batch_size']}, {config['optim']}, learning "
        f"rate {config['learning_rate']:g} ({config['lr_scheduler_type']}), seed {config['seed']}."
    )


def _limits_text(record: Mapping[str, Any]) -> str:
    """What the card must not be read as."""
    config = record["config"]
    lines = [
        f"- **No comparison of methods.** It is one run with one seed ({config['seed']}): it says nothing about the "
        "spread over seeds, nor how others would do at settings of their own.",
        f"- **One task.** The values are those of {data.find_task(record['task']).folder}'s dev set. They say nothing "
        "about other data, and they are not values of GLUE's test set.",
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


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Write the README.md of an adapter's folder.")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_FOLDER", help="folder of a saved adapter")
    parser.add_argument("results", type=Path, help="results file of the run of scripts.glue.train that made it")
    parser.add_argument("--picture", type=Path, help="a picture, copied into the folder and shown")
    parser.add_argument("--base_model", help="the base model's Hub id (default: as in the adapter's config)")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results, read_adapter(args.adapter, args.base_model))
        write_card(args.adapter, base_model=args.base_model, results=results, picture=args.picture)
    except ValueError as error:
        sys.exit(str(error))
    print(f"-> {args.adapter / 'README.md'}")


if __name__ == "__main__":
    main()
