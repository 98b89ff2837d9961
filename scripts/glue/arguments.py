"""The arguments of scripts.glue.train, and which of them decide what a run computes."""

from dataclasses import dataclass, field
from typing import Any, Optional

from transformers import TrainingArguments

from scripts.glue import data as glue_data
from scripts.glue.method_arguments import MethodArguments
from scripts.glue.methods import METHODS


@dataclass
class ScriptArguments:
    """What is trained on what, and where the record goes."""

    task: str = field(metadata={"help": f"GLUE task: {', '.join(glue_data.TASKS)} (any case; 'STS-B' works too)."})
    method: str = field(default="learner", metadata={"help": "How to train.", "choices": list(METHODS)})
    model_name_or_path: str = field(
        default="distilbert-base-uncased", metadata={"help": "Model and tokenizer: a Hub id or a local folder."}
    )
    data_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "Folder with <task's GLUE folder>/train.tsv and dev.tsv (header row, no quoting), e.g. CoLA. "
            f"Default: {glue_data.HUB_DATASET} from the Hub."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens per example; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_length, instead of to the longest example of a batch."}
    )
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "Train on that many first rows only; recorded."}
    )
    max_eval_samples: Optional[int] = field(
        default=None, metadata={"help": "Evaluate on that many first rows only; recorded."}
    )
    results_file: Optional[str] = field(
        default=None, metadata={"help": "The results file. Default: results.json in output_dir."}
    )
    float32_matmul_precision: str = field(
        default="highest",
        metadata={
            "help": "What torch.set_float32_matmul_precision gets. 'medium' may round factors to bfloat16; on CPUs "
            "it takes oneDNN in the place of MKL.",
            "choices": ["highest", "high", "medium"],
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Start again: delete the results and checkpoints of an earlier run."}
    )


@dataclass
class GlueTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's recipe as defaults."""

    output_dir: Optional[str] = field(
        default=None,
        metadata={"help": "Folder of the run. Default: runs/<task>-<method>[-r<r>]-<model>-seed<seed>."},
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate of AdamW."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs of training."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per process for training."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Batch size per process for evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch, best."})
    save_total_limit: Optional[int] = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps, epoch."})
    report_to: Optional[str] = field(default="none", metadata={"help": "Integrations to report to, e.g. tensorboard."})

    def __post_init__(self) -> None:
        self.has_default_output_dir = self.output_dir is None
        super().__post_init__()


#: Training arguments that decide what a run computes; they are recorded and must not change in a resumed run.
RECORDED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "load_best_model_at_end",
    "train_sampling_strategy",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
)

#: Arguments of the script that decide what a run computes.
DATA_ARGUMENTS = (
    "max_length",
    "pad_to_max_length",
    "max_train_samples",
    "max_eval_samples",
    "float32_matmul_precision",
)


def run_config(
    args: ScriptArguments, method_args: MethodArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """The settings that decide what a run computes: the method's, the data's and the training's."""
    config: dict[str, Any] = {name: getattr(method_args, name) for name in METHODS[args.method].arguments}
    for name in RECORDED:
        value = getattr(training_args, name, None)
        config[name] = getattr(value, "value", value)
    accumulated = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    config["total_batch_size"] = accumulated * training_args.world_size
    for name in DATA_ARGUMENTS:
        config[name] = getattr(args, name)
    return config
