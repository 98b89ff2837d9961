"""Fixtures for scripts that train or evaluate on GLUE: a tiny model and tokenizer, and invented sentences."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.glue import data as glue_data

SUBJECTS = ["cat", "dog", "bird", "fox", "child", "sailor", "farmer", "robot"]
VERBS = ["sees", "likes", "chases", "paints", "carries", "finds"]
GOOD, BAD = ["softly", "gladly", "warmly"], ["blue", "seven", "under"]
TSV_FILES = {"mnli": ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")}
#: What methods need to fit the tiny model: it has 32 positions, and is 16 wide.
METHOD_SETTINGS: dict[str, dict[str, object]] = {
    "prompt_tuning": {"num_virtual_tokens": 4, "max_length": 28},
    "bottleneck": {"bottleneck_dim": 8},
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A BERT of one layer, 16 wide, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, "the", *SUBJECTS, *VERBS, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("hidden-place") / "tiny-bert"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """TSV files of all tasks: 48 training rows, 24 dev rows. Labels follow the last word of the sentence."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def sentence(label: int) -> str:
        subject, verb, other = rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(SUBJECTS)
        return f"the {subject} {verb} the {other} {rng.choice((BAD, GOOD)[label])}"

    for task in glue_data.TASKS.values():
        (folder / task.folder).mkdir()
        pair = len(task.columns) == 2
        for name in TSV_FILES.get(task.name, ("train.tsv", "dev.tsv")):
            lines = ["sentence1\tsentence2\tlabel" if pair else "sentence\tlabel"]
            for i in range(48 if name == "train.tsv" else 24):
                label = "0.000" if task.regression else task.labels[i % len(task.labels)]
                if task.regression:
                    label = f"{rng.uniform(0, 5):.3f}"
                elif task.name != "rte":  # ids; rte keeps names, as its files do
                    label = str(i % len(task.labels))
                texts = [sentence(i % 2)] + ([sentence(rng.randrange(2))] if pair else [])
                lines.append("\t".join((*texts, label)))
            (folder / task.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def arguments(model_dir, data_dir, tmp_path) -> Callable[..., list[str]]:
    """Makes the arguments of a small run; keywords override them."""

    def make(**values: object) -> list[str]:
        defaults = {
            "task": "cola",
            "method": "lora",
            "model_name_or_path": model_dir,
            "data_dir": data_dir,
            "output_dir": tmp_path / "run",
            "max_length": 32,
            "r": 4,
            "priming_epochs": 1,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        settings = {**defaults, **METHOD_SETTINGS.get(str(values.get("method")), {}), **values}
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return make


def same_numbers(a: dict, b: dict) -> None:
    """Two runs have computed the same thing; times and memory may differ."""
    for key in ("config", "rows", "parameters", "epochs", "final"):
        assert a[key] == b[key], key
    assert [{**p, "seconds": 0} for p in a["phases"]] == [{**p, "seconds": 0} for p in b["phases"]]
