"""What `model_card.py` knows of each method: its config, what is said of it, and what its files tell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from peft_learners import Architecture, BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from scripts.glue.methods import METHODS

Config = Union[LearnerConfig, FARConfig, NASLoRAConfig, BottleneckConfig]
#: Shapes of an adapter's values, by name.
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CardMethod:
    """A method as a card tells of it.

    Attributes:
        config: class of its configs.
        adapter: what one of its adapters is called at the beginning of a sentence.
        about: what it does.
    """

    config: type[Config]
    adapter: str
    about: str


CARD_METHODS = {
    "learner": CardMethod(
        LearnerConfig,
        "A Learner adapter",
        "Learners put a low-rank module on every linear layer, and in a first phase, *priming*, train the attention's "
        "own weights too. Then those freeze, and the low-rank modules, biases, norms and the head go on training "
        "([Vucetic et al., 2022](https://arxiv.org/abs/2208.02070)).",
    ),
    "far": CardMethod(
        FARConfig,
        "A FAR adapter",
        "FAR, *Freeze And Reconfigure*, trains all weights for a short *priming*, and ranks the nodes of each "
        "feed-forward network by how far it moved them. Then only the nodes that moved most go on training, beside "
        "attention, embeddings, norms, biases and the head "
        "([Vucetic et al., 2022](https://arxiv.org/abs/2205.01541)).",
    ),
    "nas_lora": CardMethod(
        NASLoRAConfig,
        "A NAS-LoRA adapter",
        "NAS-LoRA first trains low-rank updates and changes of biases all over the model, the *search*, and estimates "
        "how much each of their parameters matters to the loss. Those that matter least are removed until the others "
        "fit a budget; these go back to their initial values, and they and the head are trained again, the "
        "*retraining* ([Lawton et al., 2023](https://arxiv.org/abs/2305.16597)).",
    ),
    "bottleneck": CardMethod(
        BottleneckConfig,
        "A bottleneck adapter",
        "Bottleneck adapters are small networks of two linear layers with an activation between them: *sequential* "
        "ones follow each attention and each feed-forward network "
        "([Houlsby et al., 2019](https://arxiv.org/abs/1902.00751)), *parallel* ones lie beside the feed-forward "
        "networks ([He et al., 2022](https://arxiv.org/abs/2110.04366)). They, the norms of the blocks and the head "
        "are trained. They are not linear, so that they can't be merged into the model.",
    ),
}


def own_fields(method: str) -> list[str]:
    """The config's fields that `train_glue.py` has arguments for."""
    return [name.removeprefix("nas_") for name in METHODS[method].arguments]


def recorded_fields(method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields as a results file tells them, by the method's own arguments: other names (seed) mean
    something else in the two."""
    own = METHODS[method].arguments
    found = {name.removeprefix("nas_"): arguments[name] for name in own if name in arguments}
    if found.get("parameter_budget", 0) > 1:  # a number of parameters, which the command line reads as a float too
        found["parameter_budget"] = round(found["parameter_budget"])
    return found


def count(shapes: Shapes, *, head: bool = False) -> int:
    """Numbers in an adapter's values, or in those of its head alone: what is no part of a NAS-LoRA update."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not (head and ".nas_lora_" in name))


def trained_by_file(config: Config, shapes: Shapes) -> dict[str, int]:
    """Trained parameters by phase, as far as the adapter's file tells: of phases that it was saved in or after."""
    phases = [phase.name for phase in config.outline().phases]
    if isinstance(config, NASLoRAConfig):
        return _trained_by_nas_lora(config, shapes, phases)
    sizes: dict[str, int] = {}
    for key, shape in shapes.items():
        kind = next(
            (k for k in ("far_kept", "far_rest", "far_bias_rest", "learner_dense_delta") if f".{k}" in key), ""
        )
        sizes[kind] = sizes.get(kind, 0) + math.prod(shape)
    trained, dense = sizes.get("", 0), sizes.get("learner_dense_delta", 0)
    rest = sizes.get("far_rest", 0) + sizes.get("far_bias_rest", 0)
    if isinstance(config, BottleneckConfig):
        return {phases[0]: trained}
    if isinstance(config, LearnerConfig):
        return {phase: trained + (dense if phase == "priming" else 0) for phase in phases}
    if not config.reconfigured:
        return {phases[0]: trained}
    kept = {phases[-1]: trained}
    return kept if config.discard_unkept else {**kept, phases[0]: trained + rest}


def _trained_by_nas_lora(config: NASLoRAConfig, shapes: Shapes, phases: list[str]) -> dict[str, int]:
    values = {name: shape for name, shape in shapes.items() if not name.endswith(("_positions", "_scores"))}
    now = {phases[config.pruned_rounds]: count(values)}
    if config.architecture is None:
        return now
    space = sum(of for parts in config.architecture.values() for _, of in parts.values())
    return {phases[0]: space + count(values, head=True), **now}


def found_before(config: Config) -> bool:
    """Whether the adapter was trained in an architecture that another one's search had found."""
    return isinstance(config, NASLoRAConfig) and config.phases_complete and not config.completed_phases


def kept_text(folder: Path, config: Config, shapes: Shapes) -> Optional[str]:
    """What a NAS-LoRA adapter keeps of its search space; None for one in its search, and for other methods."""
    if not isinstance(config, NASLoRAConfig) or not config.phases_complete:
        return None
    architecture = Architecture.from_pretrained(str(folder))
    lines = []
    for kind, name in (("low_rank", "low-rank updates"), ("bias", "biases")):
        rows = [row for row in architecture.rows() if row["kind"] == kind]
        if rows:
            sizes = [(int(row["parameters"]), int(row["of"])) for row in rows]
            left = sum(kept > 0 for kept, _ in sizes)
            lines.append(_kept_row(name, f"{left} of {len(rows)}", *map(sum, zip(*sizes, strict=True))))
    lines.append(_kept_row("all", "", architecture.kept, architecture.space))
    text = table(["updates", "in modules", "parameters kept", "of the search space's", "share"], lines)
    budget = f"The budget is {architecture.budget:,} parameters."
    head = f"The head's {count(shapes, head=True):,} parameters are trained besides, and not counted here."
    origin = " The architecture was not searched in this training, but found before." if found_before(config) else ""
    return f"{text}\n\n{budget} {head}{origin}"


def _kept_row(name: str, modules: str, kept: int, space: int) -> list[str]:
    return [name, modules, f"{kept:,}", f"{space:,}", f"{kept / space:.1%}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
