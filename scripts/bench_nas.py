"""Step time and memory of NAS-LoRA's two phases against what each should cost no more than.

    python scripts/bench_nas.py --model_name_or_path MODEL --threads 2 --out bench.json

- search_*: a step of the search against one of the same adapter that gathers no importance;
- retraining_bitfit: retraining 10 % and 1 % of the biases against BitFit (all biases and the head, in place);
- retraining_lora: retraining half of a search space of rank 16 against PEFT's LoRA of rank 8 on the same linear
  layers, with all biases.

The variants of a comparison are held at once and take their steps in turn, a step each per round; the comparisons
follow each other. A step is forward, backward, clipping, AdamW and zeroing the gradients, with `update_and_allocate`
where there are phases. Times are reported as the ratio to the first variant's step of the same round (median and
quartiles over the rounds); the seconds that stand in the file are there to compute it again, and say nothing by
themselves. Memory is counted, not sampled. Retraining is reached by a short search, with steps that train.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import run_record
import torch
from bench_common import (
    CommonArguments,
    Variant,
    aligned,
    load_config,
    load_model,
    measure,
    parse,
    random_rows,
    ratio_cells,
    record,
    take_step,
    with_optimizer,
)
from glue_methods import MethodArguments, bitfit
from peft import LoraConfig, get_peft_model

from peft_learners import NASLoRAConfig, PhaseDriver

SEARCH_STEPS, TOTAL_STEPS = 2, 4
MAX_GRAD_NORM = 1.0
SPACES = {"u_mam": NASLoRAConfig.u_mam, "s_mam": NASLoRAConfig.s_mam, "u_bitfit": NASLoRAConfig.u_bitfit}
#: The highest median of a step's time that a comparison is to find, relative to its first variant.
TARGETS = {
    **{f"search_{space}": 1.03 for space in SPACES},
    "retraining_bitfit": 1.0,
    "retraining_lora": None,
}


@dataclass
class BenchArguments(CommonArguments):
    """What is measured, on what, and where the record goes."""

    comparisons: list[str] = field(
        default_factory=lambda: list(TARGETS), metadata={"help": "Which to make.", "choices": list(TARGETS)}
    )


class Bench:
    """Makes the variants of a comparison: copies of one model, so that all begin with the same values."""

    def __init__(self, args: BenchArguments, base: torch.nn.Module, rows: dict[str, torch.Tensor]) -> None:
        self.args, self.base, self.rows = args, base, rows

    def variants(self, comparison: str) -> dict[str, Variant]:
        """The variants of a comparison, that with which the others are compared first."""
        phase, _, what = comparison.partition("_")
        if phase == "search":
            return {"plain": self.searching(what, gathers=False), "search": self.searching(what, gathers=True)}
        if what == "bitfit":
            peer = bitfit(copy.deepcopy(self.base), MethodArguments())
            shares = {"u_bitfit_10": 0.1, "u_bitfit_1": 0.01}
            own = {name: self.retraining("u_bitfit", share) for name, share in shares.items()}
            return {"bitfit": self._variant(peer, {}), **own}
        own = {f"{space}_half": self.retraining(space, 0.5) for space in ("s_mam", "u_mam")}
        return {"lora": self.lora(own["s_mam_half"].model), **own}

    def searching(self, space: str, gathers: bool) -> Variant:
        """An adapter in its search, which gathers importance or doesn't.

        The hook that gathers is called before the steps of all optimizers of the process. So it is there while its own
        variant takes a step, and gone for the others. Both variants are treated alike before their steps, because what
        that does warms caches.
        """
        variant = self._nas_lora(space, 0.5)
        tuner: Any = variant.model.base_model
        driver = PhaseDriver.of(variant.model)
        start = partial(tuner.set_schedule, total_steps=TOTAL_STEPS, optimizer=variant.optimizer)

        @contextmanager
        def in_search() -> Iterator[None]:
            start(global_step=1)  # as a resumed training, which goes on with the scores that there are
            if not gathers:
                driver.finish()
            yield
            driver.finish()

        start()
        take_step(variant, self.rows)  # the first scores
        driver.finish()
        variant.around = in_search
        if gathers:
            variant.after_step = partial(tuner.update_and_allocate, 1)
        return variant

    def retraining(self, space: str, share: float) -> Variant:
        """An adapter after a search and pruning to a share of its search space."""
        variant = self._nas_lora(space, share)
        tuner: Any = variant.model.base_model
        tuner.set_schedule(total_steps=TOTAL_STEPS, optimizer=variant.optimizer)
        for step in range(1, SEARCH_STEPS + 1):
            take_step(variant, self.rows)
            tuner.update_and_allocate(step)
        found = tuner.architecture()
        variant.settings.update(search_space=found.space, kept=found.kept)
        variant.after_step = partial(tuner.update_and_allocate, SEARCH_STEPS + 1)
        variant.saves = True
        return variant

    def lora(self, nas_lora: Any) -> Variant:
        """PEFT's LoRA on the same linear layers, with all biases and the same head."""
        peer = nas_lora.peft_config["default"]
        settings = {"r": 8, "lora_alpha": 8, "bias": "all", "target_modules": sorted(peer.target_modules)}
        config = LoraConfig(task_type="SEQ_CLS", modules_to_save=peer.modules_to_save, **settings)
        return self._variant(get_peft_model(copy.deepcopy(self.base), config), settings, saves=True)

    def _nas_lora(self, space: str, share: float) -> Variant:
        config = SPACES[space](share, search_steps=SEARCH_STEPS, task_type="SEQ_CLS")
        settings = {name: getattr(config, name) for name in ("r", "granularity", "parameter_budget")}
        return self._variant(get_peft_model(copy.deepcopy(self.base), config), settings)

    def _variant(self, model: torch.nn.Module, settings: dict[str, Any], **more: Any) -> Variant:
        return with_optimizer(self.args, model, settings, max_grad_norm=MAX_GRAD_NORM, **more)


def report(comparisons: dict[str, dict[str, Any]]) -> str:
    """The ratios to each comparison's first variant as a table."""
    kinds = ("stored", "gradients", "optimizer")
    table = [["", "target", "step time [quartiles]", *kinds, "adapter file"]]
    for title, comparison in comparisons.items():
        for name, found in comparison["variants"].items():
            limit = "" if comparison["target"] is None or name == comparison["reference"] else comparison["target"]
            table.append([f"{title}: {name}", str(limit), *ratio_cells(found, kinds)])
    return aligned(table)


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the results file holds."""
    args, device = parse(BenchArguments, __doc__, argv)
    config = load_config(args)
    bench = Bench(args, load_model(args, config, device), random_rows(args, config, device))
    comparisons: dict[str, dict[str, Any]] = {}
    for name in args.comparisons:
        found = measure(bench.variants(name), bench.rows, args.rounds)
        comparisons[name] = {"reference": next(iter(found)), "target": TARGETS[name], "variants": found}
    results = record(args, bench.base, device, comparisons=comparisons)
    run_record.write_json(Path(args.out), results)
    print(f"Ratios to each first variant, {args.rounds} rounds in turn:\n{report(comparisons)}\n-> {args.out}")
    return results


if __name__ == "__main__":
    main()
