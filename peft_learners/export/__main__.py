"""Write a saved adapter of this package as a LoRA adapter.

    python -m peft_learners.export ADAPTER OUT [--rank 64 | --energy 0.99] [--base_model NAME] [--strict-serving]

ADAPTER is a folder or a repository on the Hub. Its base model is loaded, because the values of norms and biases
outside linear layers are stored as sums with the base model's own.
"""

import argparse
import sys
from typing import Any, Optional

import transformers
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights

from ..config import PhasedConfig
from ..hub import AUTO_CLASSES
from .lora import LoraExport, save_as_lora

_HEADS = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight")


def load(adapter: str, base_model: Optional[str] = None) -> PeftModel:
    """A saved adapter on its base model.

    Raises:
        ValueError: another kind of adapter, or an unknown base model.
    """
    config: Any = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, PhasedConfig):
        raise ValueError(f"{adapter} must be a Learner, FAR or NAS-LoRA adapter, got one of type {config.peft_type}.")
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"The config in {adapter} names no base model: give it with --base_model.")
    kind = AUTO_CLASSES.get(str(config.task_type), "AutoModel")
    if config.task_type is None and config.auto_mapping:  # written by PEFT where no task type tells the class
        kind = config.auto_mapping["base_model_class"]
    options = {}
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        weights = load_peft_weights(adapter, device="cpu")
        sizes = {len(value) for key, value in weights.items() if key.endswith(_HEADS) and value.dim() == 2}
        options = {"num_labels": sizes.pop()} if len(sizes) == 1 else {}
    base = getattr(transformers, kind).from_pretrained(name, **options)
    return PeftModel.from_pretrained(base, adapter)


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
    size.add_argument("--rank", type=int, help="rank of dense updates (primed Learners, FAR)")
    size.add_argument("--energy", type=float, help="share of the energy of each dense update to keep, e.g. 0.99")
    parser.add_argument("--base_model", "--base-model", help="base model, in place of the one in the adapter's config")
    parser.add_argument(
        "--strict_serving", "--strict-serving", action="store_true", help="refuse what servers of LoRA don't take"
    )
    args = parser.parse_args(arguments)
    try:
        model = load(args.adapter, args.base_model)
        rank = args.rank if args.rank is not None else args.energy
        export = save_as_lora(args.out, model, rank, strict_serving=args.strict_serving)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report(export))
    print(f"Wrote {args.out}. It loads with PEFT alone: PeftModel.from_pretrained(base, {args.out!r}).")


if __name__ == "__main__":
    main()
