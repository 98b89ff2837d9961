"""What the benchmark runs on: models, shapes, and how many rounds a setting takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
import transformers as tf

from scripts.glue import run_record


@dataclass(frozen=True)
class Setting:
    """A model and the shape of its batches.

    Attributes:
        config: makes the model's config, its values random; None: the model of `--model_name_or_path`.
        task_type: None: masked language modelling, for which PEFT has no type.
        rank: of LoRA and Learners, and of others by what corresponds to it.
        rounds: that count.
        dropout: hidden and attention dropout; None: as the model's config says.
        device: the only kind of device that it is for; None: any.
        groups: of methods (`methods.GROUPS`); None: all.
        methods: None: all of the groups.
    """

    name: str
    tokens: int
    rank: int
    rounds: int
    batch: int = 16
    config: Optional[Callable[[], Any]] = None
    task_type: Optional[str] = "SEQ_CLS"
    dtype: torch.dtype = torch.float32
    dropout: Optional[float] = 0.0
    device: Optional[str] = None
    groups: Optional[tuple[str, ...]] = None
    methods: Optional[tuple[str, ...]] = None


def small_bert(width: int) -> tf.BertConfig:
    """A BERT of two blocks, for the curves."""
    return tf.BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        vocab_size=1024,
    )


def _bert_large() -> tf.BertConfig:
    return tf.BertConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)


def _llama() -> tf.LlamaConfig:
    return tf.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=8192
    )


def _decoder_1b() -> tf.LlamaConfig:
    """1.1 G parameters."""
    return tf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
    )


#: Where steps are long.
_MAIN = ("learner", "far", "inference")
#: FAR does not depend on the rank, nor does NAS-LoRA, whose search spaces have ranks of their own.
_WITH_FAR = ("learner", "far", "peft", "inference")
_WITH_PEERS = ("learner", "far", "peft", "peers", "inference")
_WITH_NAS = ("learner", "peft", "nas_search", "nas_search_more", "nas_retrain", "inference")

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("minilm-16x32-r8", 32, 8, rounds=20, groups=_WITH_NAS),
        Setting("minilm-16x32-r64", 32, 64, rounds=20, groups=_WITH_FAR),
        Setting("minilm-16x128-r8", 128, 8, rounds=9, groups=_WITH_NAS),
        Setting("minilm-16x128-r64", 128, 64, rounds=9, groups=_WITH_PEERS),
        Setting(
            "minilm-16x128-r64-dropout",
            128,
            64,
            rounds=1,
            dropout=None,
            groups=("learner", "far"),
            methods=(
                *("lora", "full", "learner_primed", "far_priming"),
                *("far_after", "far_after_discard", "far_after_output_node"),
            ),
        ),
        Setting("distilbert-16x128-r64", 128, 64, rounds=4, config=tf.DistilBertConfig, groups=_MAIN),
        Setting("llama-4x512-r64", 512, 64, 3, batch=4, config=_llama, task_type="CAUSAL_LM", groups=_MAIN),
        *(
            Setting(
                f"bert512-2x128-r{rank}-bf16",
                128,
                rank,
                rounds=1,
                batch=2,
                config=partial(small_bert, 512),
                dtype=torch.bfloat16,
                device="cpu",
                groups=("learner",),
            )
            for rank in (16, 64)
        ),
        Setting("bert-large-16x128-r64", 128, 64, 20, config=_bert_large, dtype=torch.bfloat16, device="cuda"),
        Setting(
            "decoder-1b-4x512-r64",
            512,
            64,
            rounds=20,
            batch=4,
            config=_decoder_1b,
            task_type="CAUSAL_LM",
            dtype=torch.bfloat16,
            device="cuda",
            groups=_MAIN,
        ),
    )
}


_AUTO: dict[Optional[str], Any] = {
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    None: tf.AutoModelForMaskedLM,
}


@dataclass
class Workload:
    """A setting made ready: the model, in which nothing is adapted yet, and one batch.

    Attributes:
        linear_layers: names of the layers that are adapted, once they are known.
    """

    setting: Setting
    base: torch.nn.Module
    rows: dict[str, torch.Tensor]
    model: str
    seed: int
    fused: bool = True
    linear_layers: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.rows["input_ids"].device

    def record(self) -> dict[str, Any]:
        """The setting as it stands in each row."""
        config, setting = self.base.config, self.setting
        first = next(self.base.parameters())
        return {
            "name": setting.name,
            "model": self.model,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "batch": setting.batch,
            "tokens": setting.tokens,
            "rank": setting.rank,
            "rounds": setting.rounds,
            "dropout": dropout_of(config),
            "dtype": str(first.dtype).removeprefix("torch."),
            "attention": getattr(config, "_attn_implementation", None),
            "threads": torch.get_num_threads(),
            "fused_optimizer": self.fused,
            "seed": self.seed,
        }


def prepare(
    setting: Setting, path: Optional[str], device: torch.device, seed: int = 0, fused: bool = True
) -> Workload:
    """The setting's model, with a head of two classes where it has one that is new, and a batch.

    Args:
        path: a Hub id or a folder, for settings without a config of their own.

    Raises:
        ValueError: no model was given, or more tokens than it has positions.
    """
    if setting.config is not None:
        config = setting.config()
        config.num_labels = 2
        label = f"{config.model_type} from its config"
    elif path is None:
        raise ValueError(f"--model_name_or_path must name the model of the setting {setting.name}, got nothing.")
    else:
        config, label = tf.AutoConfig.from_pretrained(path, num_labels=2), run_record.model_label(path)
    positions = getattr(config, "max_position_embeddings", setting.tokens)
    if not 1 <= setting.tokens <= positions:
        raise ValueError(f"tokens must be from 1 to {positions} for the model {label}, got {setting.tokens}.")
    if setting.dropout is not None:
        for name in dropout_of(config):
            setattr(config, name, setting.dropout)
    if config.pad_token_id is None:  # heads that look for the last token of a row need one
        config.pad_token_id = 0
    auto = _AUTO[setting.task_type]
    torch.manual_seed(seed)
    if setting.config is not None:
        base = auto.from_config(config, dtype=setting.dtype)
    else:
        base = auto.from_pretrained(path, config=config, dtype=setting.dtype)
    return Workload(setting, base.to(device), random_rows(setting, config, device, seed), label, seed, fused)


def dropout_of(config: Any) -> dict[str, float]:
    """The config's dropout rates by the names they have in this architecture; not LayerDrop, which skips layers."""
    numbers = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: float(v) for k, v in numbers.items() if "drop" in k and "layerdrop" not in k}


def random_rows(setting: Setting, config: Any, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """One batch of random tokens without padding; labels are the tokens themselves, or one of two classes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.batch, setting.tokens)
    with torch.device("cpu"):  # the generator's, whatever the default is
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
        rows = {
            "input_ids": tokens,
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "labels": tokens.clone()
            if setting.task_type != "SEQ_CLS"
            else torch.randint(2, shape[:1], generator=generator),
        }
    return {name: value.to(device) for name, value in rows.items()}
