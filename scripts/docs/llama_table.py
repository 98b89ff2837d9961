"""Write the tables of what adapters add to Llamas of 1 and 8 billion parameters, by setting, into docs/llm.md.

    python -m scripts.docs.llama_table           # writes them between their markers
    python -m scripts.docs.llama_table --check   # writes nothing; fails if a table is not up to date

Everything is counted on the models' shapes, without data (the meta device): no download, and little memory.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.costs import COPIES_IN_TRAINING, FLOAT32, PhaseCost, base_bytes
from peft_learners.phases.report import in_units
from scripts.docs.pages import ROOT, Lines, markdown, spliced

PAGE = ROOT / "docs" / "llm.md"
KIND = "costs"
#: The models: Llama-3.2-1B, whose head is tied to the embeddings, and Llama-3.1-8B.
COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def settings(blocks: int) -> dict[str, PeftConfig]:
    """A table's lines for a model of so many blocks: how a setting is written, and what is counted for it."""
    last = list(range(blocks * 3 // 4, blocks))
    return {
        "`LoraConfig(r=16)` on all linear layers": LoraConfig(r=16, target_modules="all-linear"),
        "`LoraConfig(r=64)` on all linear layers": LoraConfig(r=64, target_modules="all-linear"),
        "`LearnerConfig(r=16, priming_epochs=0)`": LearnerConfig(r=16, priming_epochs=0),
        "`LearnerConfig(priming_epochs=0)` (r=64)": LearnerConfig(priming_epochs=0),
        "`LearnerConfig(r=16)`": LearnerConfig(r=16),
        "`LearnerConfig()` (r=64)": LearnerConfig(),
        "`LearnerConfig(after_priming='fold')`": LearnerConfig(after_priming="fold"),
        "`LearnerConfig(save_dtype='bfloat16')`": LearnerConfig(save_dtype="bfloat16"),
        f"`LearnerConfig(priming_modules=[{last[0]}, ..., {last[-1]}])`": LearnerConfig(priming_modules=last),
        "`LearnerConfig(priming_modules='ffn')`": LearnerConfig(priming_modules="ffn"),
        "`LearnerConfig(priming_modules='all')`": LearnerConfig(priming_modules="all"),
        "`FARConfig()`": FARConfig(),
        "`FARConfig(train_embeddings=False)`": FARConfig(train_embeddings=False),
        "`FARConfig(discard_unkept=True)`": FARConfig(discard_unkept=True),
        "`NASLoRAConfig()` (r=16)": NASLoRAConfig(),
        "`BottleneckConfig()`": BottleneckConfig(),
        "`BottleneckConfig(mode='parallel')`": BottleneckConfig(mode="parallel"),
    }


def llama(size: str) -> nn.Module:
    """A Llama in bfloat16, without data."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**COMMON, **SIZES[size])).to(torch.bfloat16)


def costs_of(base: nn.Module, config: PeftConfig) -> list[PhaseCost]:
    """What an adapter costs in each of its phases; the adapter stays on the model."""
    # NAS-LoRA draws its initial values on the CPU, whatever the device is.
    place = nullcontext() if isinstance(config, NASLoRAConfig) else torch.device("meta")
    with warnings.catch_warnings(), place:
        warnings.simplefilter("ignore")  # that it is much is what the table is for
        model = get_peft_model(base, config)
    if not isinstance(config, LoraConfig):
        return model.base_model.costs_by_phase()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    values = trained * FLOAT32
    return [PhaseCost("training", trained, COPIES_IN_TRAINING * values, values)]


def table(base: Callable[[], nn.Module]) -> pd.DataFrame:
    """The cells of the table for a model."""
    lines = []
    for name, config in settings(base().config.num_hidden_layers).items():
        found = costs_of(base(), config)
        first, last = found[0], found[-1]
        bound = "≤ " if last.at_most else ""
        lines.append(
            {
                "setting": name,
                "trained first, M": f"{first.trained / 1e6:,.1f}",
                "after the boundary, M": f"{bound}{last.trained / 1e6:,.1f}" if len(found) > 1 else "",
                "added in training first": in_units(first.in_training),
                "after the boundary": f"{bound}{in_units(last.in_training)}" if len(found) > 1 else "",
                "file": f"{bound}{in_units(last.file)}",
            }
        )
    return pd.DataFrame(lines)


def with_table(text: str) -> str:
    """A page's text with the tables between their markers.

    Raises:
        ValueError: the page has no markers for one of them.
    """
    for size in SIZES:
        if f"<!-- {KIND}:{size} -->" not in text:
            raise ValueError(f"The page must hold <!-- {KIND}:{size} --> and, after it, <!-- {KIND}:end -->.")
    return spliced(text, KIND, lambda name: list(_lines(name)))


@cache
def _lines(size: str) -> Lines:
    base = llama(size)
    count, held = sum(p.numel() for p in base.parameters()), in_units(base_bytes(base))
    return [
        *markdown(table(lambda: llama(size))),
        "",
        f"The base model itself has {count / 1e6:,.1f} M parameters in {held}.",
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the table is not up to date")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/llm.md)")
    args = parser.parse_args(argv)
    text = args.page.read_text(encoding="utf-8")
    new = with_table(text)
    if args.check and new != text:
        sys.exit(f"Not up to date: {args.page.name}. Run: python -m scripts.docs.llama_table")
    if new != text:
        args.page.write_text(new, encoding="utf-8")
        print(f"-> {args.page}")


if __name__ == "__main__":
    main()
