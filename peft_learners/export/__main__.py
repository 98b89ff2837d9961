"""Write a saved adapter of this package as a LoRA adapter.

    python -m peft_learners.export ADAPTER OUT [--rank 64 | --energy 0.99] [--base_model NAME] [--num_labels N]
        [--strict-serving]

ADAPTER is a folder or a repository on the Hub. Its base model is loaded, because the values of norms and biases
outside linear layers are stored as sums with the base model's own. The size of its head is found from the adapter's
file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Optional

import transformers
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from ..checkpoint import Shapes
from ..config import PhasedConfig
from ..hub.short_card import auto_class, num_labels_in
from .lora import LoraExport, save_as_lora


def load(adapter: str, base_model: Optional[str] = None, num_labels: Optional[int] = None) -> PeftModel:
    """A saved adapter on its base model, in the revision that the config names.

    Args:
        adapter: folder, or repository on the Hub.
        base_model: in place of the one in the config.
        num_labels: classes of the head, in place of what the adapter's file tells.

    Raises:
        ValueError: another kind of adapter, or a damaged one, or no base model that it fits.
    """
    try:
        config: Any = PeftConfig.from_pretrained(adapter)
    except json.JSONDecodeError as error:
        raise ValueError(f"The adapter_config.json in {adapter} is damaged ({error}).") from error
    if not isinstance(config, PhasedConfig):
        raise ValueError(f"{adapter} must be a Learner, FAR or NAS-LoRA adapter, got one of type {config.peft_type}.")
    if config.unmergeable:
        raise ValueError(f"{adapter} can't become a LoRA adapter. {config.unmergeable}")
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"The config in {adapter} names no base model: give it with --base_model.")
    try:
        shapes = {key: tuple(value.shape) for key, value in load_peft_weights(adapter, device="cpu").items()}
    except SafetensorError as error:
        raise ValueError(f"The file of weights in {adapter} is damaged ({error}).") from error
    whole = {key.removeprefix("base_model.model."): shape for key, shape in shapes.items()}
    base = _load_base(name, config, num_labels or num_labels_in(config, auto_class(config), shapes), whole)
    if num_labels is None and (fitting := _fitting_num_labels(base, whole)) is not None:
        base = _load_base(name, config, fitting, whole)
    return PeftModel.from_pretrained(base, adapter)


def _load_base(name: str, config: PhasedConfig, num_labels: Optional[int], replaced: Shapes) -> Any:
    """The base model. Its weights may differ in shape where the adapter replaces them."""
    kind = auto_class(config)
    loader: Any = getattr(transformers, kind, None) if kind is not None else None
    if loader is None:
        kind = (config.auto_mapping or {}).get("base_model_class")
        raise ValueError(
            f"The adapter was made for a {kind}, which transformers does not load by itself. Load it in Python, and "
            "call peft_learners.export.save_as_lora(folder, model)."
        )
    options: dict[str, Any] = {"revision": config.revision} if config.revision is not None else {}
    if num_labels is not None:
        options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    try:
        base, found = loader.from_pretrained(name, output_loading_info=True, **options)
    except OSError as error:
        which = f"{name!r}{f', revision {config.revision!r}' if config.revision is not None else ''}"
        said = str(error).partition("\n")[0].rstrip(". ")
        raise ValueError(
            f"The base model {which} can't be loaded ({said}). Give its id or folder with --base_model."
        ) from error
    if lost := sorted({key for key, *_ in found["mismatched_keys"]} - replaced.keys()):
        raise ValueError(
            f"The base model {name!r} has another shape than its config with num_labels={num_labels} says (first: "
            f"{lost[0]}), in values that the adapter does not hold. Give the number of classes with --num_labels."
        )
    return base


def _fitting_num_labels(base: Any, whole: Shapes) -> Optional[int]:
    """The number of classes with which the base model's shapes would be those in the adapter's file.

    None if they are already, or if more than the first dimension of the last layer differs.
    """
    own = {key: tuple(value.shape) for key, value in base.state_dict().items()}
    different = [(own[key], shape) for key, shape in whole.items() if own.get(key, shape) != shape]
    more = {there[0] - here[0] for here, there in different if here[1:] == there[1:] and here}
    fits = len(more) == 1 and all(here[1:] == there[1:] for here, there in different)
    return base.config.num_labels + more.pop() if fits else None


def report(export: LoraExport) -> str:
    """A table of the modules that are not exact, and a closing line."""
    lines = [f"{'module':<60} {'rank':>5} {'error':>9}"] if not export.exact else []
    lines += [f"{m.name:<60} {m.rank:>5} {m.error:>9.2e}" for m in export.modules if not m.exact]
    count = sum(m.parameters for m in export.modules)
    how = "exact" if export.exact else f"largest error {export.worst.error:.2e}, in {export.worst.name}"
    lines += [f"note: {note}" for note in export.notes]
    return "\n".join([*lines, f"{len(export.modules)} modules, {count:,} parameters; {how}."])


def main(arguments: Optional[list[str]] = None) -> None:
    """The command, with `sys.argv`'s arguments by default."""
    parser = argparse.ArgumentParser(prog="python -m peft_learners.export", description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder of the adapter, or its repository on the Hub")
    parser.add_argument("out", help="folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--rank",
        type=lambda word: float(word) if "." in word else int(word),
        help="rank of dense updates (primed Learners, FAR); or the share of their energy to keep, e.g. 0.99",
    )
    size.add_argument("--energy", type=float, help="share of the energy of each dense update to keep, e.g. 0.99")
    parser.add_argument("--base_model", "--base-model", help="base model, in place of the one in the adapter's config")
    parser.add_argument(
        "--num_labels", "--num-labels", type=int, help="classes of the head, if they are not found from the file"
    )
    parser.add_argument(
        "--strict_serving", "--strict-serving", action="store_true", help="refuse what servers of LoRA don't take"
    )
    args = parser.parse_args(arguments)
    if args.num_labels is not None and args.num_labels < 1:
        parser.error(f"--num_labels must be at least 1, got {args.num_labels}")
    if Path(args.out).is_file():
        sys.exit(f"error: OUT must be a folder to write, but {args.out} is a file.")
    try:
        model = load(args.adapter, args.base_model, args.num_labels)
        rank = args.rank if args.rank is not None else args.energy
        export = save_as_lora(args.out, model, rank, strict_serving=args.strict_serving)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report(export))
    print(f"Wrote {args.out}. It loads with PEFT alone: PeftModel.from_pretrained(base, {args.out!r}).")


if __name__ == "__main__":
    main()
