"""`peft-learners export`: a saved adapter on its base model, written as LoRA.

The base model is loaded, because the values of norms and biases outside linear layers are stored as sums with the base
model's own. The size of its head is found from the adapter's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import transformers
from peft import PeftModel

from ..checkpoint import Shapes
from ..config import PhasedConfig
from ..export import LoraExport, save_as_lora
from ..hub.short_card import auto_class, num_labels_in
from . import CommandError
from .source import read


def run(
    adapter: str,
    out: Path,
    rank: Optional[float],
    base_model: Optional[str],
    num_labels: Optional[int],
    strict_serving: bool,
) -> None:
    """Export an adapter, and say what is not exact."""
    if out.is_file():
        raise CommandError(f"OUT must be a folder to write, but {out} is a file.")
    transformers.utils.logging.set_verbosity_error()  # its report of a new head, which the adapter's replaces
    transformers.utils.logging.disable_progress_bar()
    export = save_as_lora(out, load(adapter, base_model, num_labels), rank, strict_serving=strict_serving)
    print(report(export))
    print(f"Wrote {out}. It loads with PEFT alone: PeftModel.from_pretrained(base, {str(out)!r})")


def load(adapter: str, base_model: Optional[str] = None, num_labels: Optional[int] = None) -> PeftModel:
    """A saved adapter on its base model, in the revision that the config names.

    Args:
        adapter: folder, or repository on the Hub.
        base_model: in place of the one in the config.
        num_labels: classes of the head, in place of what the adapter's file tells.

    Raises:
        ValueError: another kind of adapter, or a damaged one, or no base model that it fits.
    """
    found = read(adapter)
    config = found.config
    if config.unmergeable:
        raise CommandError(f"{adapter} can't become a LoRA adapter. {config.unmergeable}")
    name = base_model or config.base_model_name_or_path
    if not name:
        raise CommandError(f"The config in {adapter} names no base model: give it with --base-model.")
    labels = num_labels or num_labels_in(config, auto_class(config), found.shapes)
    whole = {key.removeprefix("base_model.model."): shape for key, shape in found.shapes.items()}
    base = _load_base(name, config, labels, whole)
    if num_labels is None and (fitting := _fitting_num_labels(base, whole)) is not None:
        base = _load_base(name, config, fitting, whole)
    return PeftModel.from_pretrained(base, str(found.folder))


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
            f"The base model {which} can't be loaded ({said}). Give its id or folder with --base-model."
        ) from error
    if lost := sorted({key for key, *_ in found["mismatched_keys"]} - replaced.keys()):
        raise ValueError(
            f"The base model {name!r} has another shape than its config with num_labels={num_labels} says (first: "
            f"{lost[0]}), in values that the adapter does not hold. Give the number of classes with --num-labels."
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
