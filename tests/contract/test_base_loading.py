"""What loads an adapter's base model, the cards' lines and the export command: the right class, head and revision."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from console import refused, said
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from zoo import logits_of

from peft_learners import LearnerConfig, NASLoRAConfig

CONFIGS = {
    "learner": lambda **more: LearnerConfig(**{"r": 4, "priming_epochs": 0, "init_weights": False, **more}),
    "nas_lora": lambda **more: NASLoRAConfig(**{"r": 4, "init_weights": False, **more}),
}
ARCHITECTURES = ("distilbert", "bert", "roberta", "mobilebert", "albert", "gpt2", "vit", "bart")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bart() -> torch.nn.Module:
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    return transformers.BartForSequenceClassification(config)


def saved(arch: str, classes: int, method: str = "learner", **settings) -> tuple[torch.nn.Module, dict, torch.Tensor]:
    """An adapter in `my-adapter` with a head of some size; its base model, with one of two classes, in `base`.

    Returns:
        Its base model's class, inputs and what it makes of them.
    """
    base = bart() if arch == "bart" else zoo.build(arch)
    base.save_pretrained("base")
    name = Path("base").resolve()
    base = type(base).from_pretrained(name, num_labels=classes, ignore_mismatched_sizes=True)
    kind = type(base)
    config = CONFIGS[method](**{"task_type": None if arch == "vit" else "SEQ_CLS", **settings})
    model = get_peft_model(base, config).eval()
    model.save_pretrained("my-adapter")
    inputs = {k: v for k, v in zoo.inputs_of("vit" if arch == "vit" else "bert", model).items() if k != "labels"}
    if arch == "bart":
        inputs["input_ids"][:, -1] = base.config.eos_token_id  # what its head reads
    expected = logits_of(model, inputs)
    assert expected.shape == (zoo.ROWS, classes)
    return kind, inputs, expected


def cards() -> list[str]:
    """Of the adapter: the one that was written when it was saved, and that of `peft-learners card`."""
    automatic = Path("my-adapter/README.md").read_text()
    said("card", "my-adapter")
    return [automatic, Path("my-adapter/README.md").read_text()]


def exported(kind: type, classes: int) -> PeftModel:
    base = kind.from_pretrained("base", num_labels=classes, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, "as-lora")
    assert isinstance(model.peft_config["default"], LoraConfig)
    return model


@pytest.mark.parametrize(
    ("arch", "classes", "method"),
    [
        # 16: as many as the head's inputs; 32: as the FFN's nodes
        *((arch, classes, "learner") for arch in ARCHITECTURES for classes in (5, 16, 32)),
        ("bert", 5, "nas_lora"),
        ("gpt2", 16, "nas_lora"),
    ],
)
def test_heads_load(arch, classes, method):
    """Heads of any form and size are loaded."""
    kind, inputs, expected = saved(arch, classes, method)
    for card in cards():
        (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
        names: dict = {}
        exec(code.partition("merged =")[0], names)
        assert torch.equal(logits_of(names["model"], inputs), expected)
    said("export", "my-adapter", "as-lora")
    torch.testing.assert_close(logits_of(exported(kind, classes), inputs), expected, rtol=1e-5, atol=1e-6)


def test_question_answering_head():
    """A head for question answering has two outputs per token, whatever the base model had."""
    config = transformers.BertConfig(**zoo.SMALL, max_position_embeddings=32, num_labels=9)
    transformers.BertForTokenClassification(config).save_pretrained("nine-tags")
    name = Path("nine-tags").resolve()
    base = transformers.AutoModelForQuestionAnswering.from_pretrained(name, num_labels=2)
    get_peft_model(base, CONFIGS["learner"](task_type="QUESTION_ANS")).save_pretrained("my-adapter")
    for card in cards():
        assert 'from_pretrained("nine-tags", num_labels=2, ' in card
    said("export", "my-adapter", "as-lora")


def test_modules_to_save_no_head():
    """Modules in `modules_to_save` that are no head don't count as one."""
    saved("bert", 5, modules_to_save=["pooler", "word_embeddings"])
    assert all("num_labels=5, " in card for card in cards())
    llama = get_peft_model(zoo.build("llama"), CONFIGS["learner"](task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    llama.save_pretrained("my-adapter")
    said("card", "my-adapter", "--base_model", "somebody/llama")
    assert "num_labels" not in Path("my-adapter/README.md").read_text()


def test_card_revision():
    """The base model's revision is in the cards."""
    zoo.build("bert").save_pretrained("base")
    base = AutoModelForSequenceClassification.from_pretrained(Path("base").resolve())
    get_peft_model(base, CONFIGS["learner"](task_type="SEQ_CLS"), revision="v9").save_pretrained("my-adapter")
    for card in cards():
        assert 'from_pretrained("base", revision="v9", num_labels=2, ignore_mismatched_sizes=True)' in card


# -- the export command alone ----------------------------------------------------------------------------------------


def test_command_finds_head():
    """Where the head's size can't be read off the config, the command compares the head with the file. Named by their
    whole path, the embeddings look like a part of the head: 64 outputs, or 5?"""
    kind, inputs, expected = saved("bert", 5, modules_to_save=["bert.embeddings.word_embeddings"])
    said("card", "my-adapter")
    assert "num_labels" not in Path("my-adapter/README.md").read_text()
    said("export", "my-adapter", "as-lora")
    torch.testing.assert_close(logits_of(exported(kind, 5), inputs), expected, rtol=1e-5, atol=1e-6)


def test_command_num_labels():
    """The command takes the number of classes, and says if it is wrong."""
    kind, inputs, expected = saved("bert", 5)
    wrong = refused("export", "my-adapter", "as-lora", "--num_labels", "4")
    assert re.match(r"The checkpoint does not fit .*\(5.*in the file, \(4", wrong)
    said("export", "--num-labels", "5", "my-adapter", "as-lora")
    torch.testing.assert_close(logits_of(exported(kind, 5), inputs), expected, rtol=1e-5, atol=1e-6)
    none = refused("export", "my-adapter", "as-lora", "--num-labels", "0")
    assert none == "argument --num-labels: must be a whole number of at least 1, got '0'"


def test_command_errors():
    """The command says what it can't load or write."""
    saved("bert", 2)
    config, own = Path("my-adapter/adapter_config.json"), Path("my-adapter/adapter_config.json").read_text()
    Path("a-file").write_text("mine")
    for call, start in (
        (["my-adapter", "out", "--base-model", "no/such-model"], "The base model 'no/such-model' can't be loaded"),
        (["my-adapter", "a-file"], "OUT must be a folder to write, but a-file is a file"),
        (["my-adapter", "my-adapter"], "my-adapter holds an adapter of type LEARNER, which the export would destroy"),
        (["nowhere", "out"], "There is no folder nowhere."),
    ):
        assert refused("export", *call).startswith(start)
    assert config.read_text() == own and Path("a-file").read_text() == "mine" and not Path("out").exists()
    config.write_text(json.dumps({**json.loads(own), "revision": "v9", "base_model_name_or_path": "no/such-model"}))
    wrong = refused("export", "my-adapter", "out")
    assert re.search(r"'no/such-model', revision 'v9' can't be loaded .* with --base-model\.$", wrong)
    config.write_text(json.dumps({**json.loads(own), "base_model_name_or_path": None}))
    assert refused("export", "my-adapter", "out").endswith("names no base model: give it with --base-model.")
    config.write_text('{"peft_type": "FAR",')
    assert refused("export", "my-adapter", "out").endswith("but its adapter_config.json is damaged.")
    config.write_text(own)
    Path("my-adapter/adapter_model.safetensors").write_bytes(b"half a file")
    assert re.match(
        r"my-adapter/adapter_model\.safetensors is damaged \(.*\)\.$", refused("export", "my-adapter", "out")
    )


def test_command_foreign_model():
    """The command refuses models that aren't transformers' own."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    get_peft_model(base, CONFIGS["learner"](target_modules=["0"])).save_pretrained("my-adapter")
    wrong = refused("export", "my-adapter", "out", "--base-model", "base")
    assert re.match(r"The adapter was made for a Sequential, .*save_as_lora", wrong)
