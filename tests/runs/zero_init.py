"""NAS-LoRA in two runs under ZeRO-3, with a base model that is loaded after TrainingArguments were made.

Each process then holds parts of it, before it gets its adapter. `main(FOLDER, PARTITIONED)` takes the base in
FOLDER/../base and leaves the adapter at the end in `final`; without PARTITIONED the base is loaded whole.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel, get_peft_model
from runs.engines_tiny import BOUNDARY, Runs, let_a_cpu_use_engines, settings_of
from training import arguments
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peft_learners import NASLoRAConfig, PhaseCallback


def main(folder: str, partitioned: bool) -> None:
    let_a_cpu_use_engines()
    runs = Runs(Path(folder), "zero3", "distilbert", "nas")
    runs.folder, held = Path(folder), set()

    def base() -> PreTrainedModel:
        unset_hf_deepspeed_config()
        known = arguments(folder, **settings_of("zero3", "distilbert")) if partitioned else None
        model = AutoModelForSequenceClassification.from_pretrained(Path(folder).parent / "base")
        held.add(sum(hasattr(parameter, "ds_id") for parameter in model.parameters()))
        del known
        return model

    set_seed(1)
    model = get_peft_model(base(), NASLoRAConfig(r=4, search_steps=BOUNDARY, task_type="SEQ_CLS"))
    first = runs.trainer("first", model, [PhaseCallback(stop_at_boundary=True)], max_steps=6)
    first.train()
    first.accelerator.free_memory()
    model = PeftModel.from_pretrained(base(), runs.folder / "first" / f"checkpoint-{BOUNDARY}", is_trainable=True)
    second = runs.trainer("second", model, [PhaseCallback()], max_steps=2)
    second.train()
    runs.save(second)
    (runs.folder / "results.json").write_text(json.dumps(sorted(held)))
