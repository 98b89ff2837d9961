"""Pictures of learned architectures: shares and their means are right, and what can't be averaged is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from console import refused, said
from matplotlib.image import imread
from peft import get_peft_model
from training import adapted, arguments, save_undriven, sgd, trainer

from peft_learners import Architecture, NASLoRAConfig
from peft_learners.cli import architecture as architectures
from peft_learners.cli.architecture import Column
from peft_learners.cli.names import OUTSIDE, split_name
from peft_learners.hub.full_card import read_adapter

#: Parts with parameters kept and in the search space.
Counts = dict[str, dict[str, tuple[int, int]]]


def architecture(counts: Counts, granularity: str = "unstructured", budget: int = 100) -> Architecture:
    return Architecture(granularity, 4, budget, counts, {})


def columns(table: architectures.Table) -> dict[Column, list]:
    """The table by columns."""
    return dict(zip(table.columns, map(list, zip(*table.shares, strict=True)), strict=True))


def saved(folder: Path, arch: str = "bert", *, past_search: bool = True, **settings) -> torch.nn.Module:
    """An adapter that keeps a random half of its search space, saved to `folder`."""
    settings = {"r": 4, "search_steps": 1, "criterion": "random", "task_type": zoo.ZOO[arch].task_type, **settings}
    model = get_peft_model(zoo.build(arch), NASLoRAConfig(**settings))
    model.base_model.set_schedule(total_steps=5, optimizer=sgd(model))
    if past_search:
        model.base_model.update_and_allocate(1)
    return save_undriven(model, folder)


def read(*folders: Path) -> architectures.Table:
    found = {folder.name: read_adapter(folder, base_needed=False) for folder in folders}
    return architectures.average({name: architectures.read_architecture(own) for name, own in found.items()})


def test_split_names():
    """Names are split at the block."""
    assert split_name("bert.encoder.layer.10.output.dense") == (
        "bert.encoder.layer.10",
        "output.dense",
    )
    assert split_name("encoder.block.0.layer.1.EncDecAttention.q") == (
        "encoder.block.0",
        "layer.1.EncDecAttention.q",
    )
    assert split_name("bert.embeddings.LayerNorm") == ("", "bert.embeddings.LayerNorm")
    assert split_name("transformer.ln_1.0") == ("", "transformer.ln_1.0")


def test_shares_of_one_architecture():
    counts = {
        "bert.encoder.layer.10.output.dense": {"U": (3, 20), "V": (7, 20), "bias": (1, 5)},
        "bert.encoder.layer.2.output.dense": {"U": (0, 20), "V": (10, 20), "bias": (5, 5)},
        "bert.encoder.layer.2.attention.Norm": {"bias": (0, 5)},
        "bert.embeddings.LayerNorm": {"bias": (2, 5)},
        "bert.pooler.dense": {"U": (2, 8), "V": (2, 8), "bias": (4, 8)},
    }
    table = architectures.average({"a": architecture(counts)})
    assert table.rows == ["bert.encoder.layer.2", "bert.encoder.layer.10", OUTSIDE]
    assert columns(table) == {
        # 0 + 10 and 3 + 7 of 20 + 20
        Column("output.dense", "low_rank"): [0.25, 0.25, None],
        Column("attention.Norm", "bias"): [0.0, None, None],
        Column("output.dense", "bias"): [1.0, 0.2, None],
        Column("pooler.dense", "low_rank"): [None, None, 0.25],
        Column("embeddings.LayerNorm", "bias"): [None, None, 0.4],
        Column("pooler.dense", "bias"): [None, None, 0.5],
    }
    assert list(columns(table)) == table.columns
    # 40 + 5, 40 + 5, 5, 5, and 16 + 8 parameters
    assert (table.granularity, table.space, table.budgets) == ("unstructured", 124, [100])


def test_shares_are_averaged():
    first = {"h.0.a": {"U": (4, 16), "V": (2, 8), "bias": (4, 4)}, "h.1.a": {"bias": (0, 4)}}
    second = {"h.0.a": {"U": (12, 16), "V": (6, 8), "bias": (0, 4)}, "h.1.a": {"bias": (4, 4)}}
    third = {"h.1.a": {"bias": (4, 4)}, "h.0.a": {"bias": (4, 4), "V": (4, 8), "U": (8, 16)}}
    given = {"a": (first, 9), "b": (second, 7), "c": (third, 9)}
    table = architectures.average({k: architecture(c, "structured", budget) for k, (c, budget) in given.items()})
    assert table.rows == ["h.0", "h.1"] and table.budgets == [9, 7, 9]
    # ranks 1, 3 and 2 of 4; biases 4, 0, 4 and 0, 4, 4 of 4
    assert columns(table) == {Column("a", "low_rank"): [0.5, None], Column("a", "bias"): [2 / 3, 2 / 3]}
    assert architectures.title_of(table) == (
        "NAS-LoRA (structured): share kept by a budget of 7 to 9 of 32 parameters, mean of 3 adapters"
    )


def test_biases_outside_the_blocks_alone():
    table = architectures.average({"a": architecture({"bert.embeddings.LayerNorm": {"bias": (1, 4)}})})
    assert (table.rows, table.columns, table.shares) == ([OUTSIDE], [Column("LayerNorm", "bias")], [[0.25]])


def test_other_search_spaces_are_refused():
    ours = architecture({"h.0.a": {"bias": (1, 4)}, "h.0.b": {"bias": (1, 4)}})

    def averaged_with(other: Architecture) -> None:
        architectures.average({"ours": ours, "same": ours, "theirs": other})

    with pytest.raises(ValueError, match="bias update of h.0.b has 4 parameters in that of ours and 5 .* of theirs"):
        averaged_with(architecture({"h.0.a": {"bias": (1, 4)}, "h.0.b": {"bias": (1, 5)}}))
    with pytest.raises(ValueError, match="bias update of h.0.b has 4 parameters .* of ours and none in that of their"):
        averaged_with(architecture({"h.0.a": {"bias": (1, 4)}}))
    with pytest.raises(ValueError, match="low-rank update of h.0.a has none in that of ours and 8 parameters"):
        averaged_with(architecture({**ours.counts, "h.0.a": {"U": (1, 4), "V": (1, 4), "bias": (1, 4)}}))
    with pytest.raises(ValueError, match="of one granularity .* ours is unstructured and theirs is structured"):
        averaged_with(architecture(ours.counts, "structured"))


BERT = ["attention.output.dense", "attention.self.key", "attention.self.query", "intermediate.dense", "output.dense"]
#: Rows, and columns with low-rank updates, with biases in blocks, and outside.
ARCHITECTURES = {
    "bert": (["bert.encoder.layer.0", "bert.encoder.layer.1"], BERT, 8, ["embeddings.LayerNorm", "pooler.dense"]),
    "roberta": (["roberta.encoder.layer.0", "roberta.encoder.layer.1"], BERT, 8, ["embeddings.LayerNorm"]),
    "distilbert": (
        ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
        ["attention.k_lin", "attention.out_lin", "attention.q_lin", "ffn.lin1", "ffn.lin2"],
        8,
        ["embeddings.LayerNorm"],
    ),
    "gpt2": (
        ["transformer.h.0", "transformer.h.1"],
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        6,
        ["ln_f"],
    ),
    "llama": (
        ["model.layers.0", "model.layers.1"],
        ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koq")],
        0,
        [],
    ),
    "t5": (
        [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)],
        [
            *(f"layer.0.SelfAttention.{x}" for x in "koq"),
            *(f"layer.1.{x}" for x in ("DenseReluDense.wi", "DenseReluDense.wo")),
            *(f"layer.1.EncDecAttention.{x}" for x in "koq"),
            *(f"layer.2.{x}" for x in ("DenseReluDense.wi", "DenseReluDense.wo")),
        ],
        0,
        [],
    ),
    "vit": (
        ["vit.layers.0", "vit.layers.1"],
        [*(f"attention.{x}_proj" for x in "koq"), "mlp.fc1", "mlp.fc2"],
        8,
        ["embeddings.patch_embeddings.projection", "layernorm"],
    ),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["structured", "unstructured"])
def test_architectures(tmp_path, arch, granularity):
    blocks, low_rank, biases, outside = ARCHITECTURES[arch]
    model = saved(tmp_path, arch, granularity=granularity)
    table = read(tmp_path)
    assert table.rows == [*blocks, *([OUTSIDE] if outside else [])]
    kinds = [column.kind for column in table.columns]
    assert kinds == ["low_rank"] * len(low_rank) + ["bias"] * (biases + len(outside))
    names = [column.module for column in table.columns]
    assert names[: len(low_rank)] == low_rank and names[len(low_rank) + biases :] == outside
    # Each of the model's updates is in one place, and nothing else is.
    rows = {(row["module"], row["kind"]): row for row in model.base_model.architecture().rows()}
    shares = [share for row in table.shares for share in row if share is not None]
    assert len(shares) == len(rows)
    for block, values in zip(blocks, table.shares, strict=False):
        for column, share in zip(table.columns, values, strict=True):
            row = rows.get((f"{block}.{column.module}", column.kind))
            assert share == (None if row is None else row["parameters"] / row["of"])
    assert (table.space, table.granularity) == (model.base_model.architecture().space, granularity)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[list[Path]]:
    """Adapters of two seeds, as Trainer makes them."""
    folders = []
    for seed in (0, 1):
        run = tmp_path_factory.mktemp("run") / f"seed{seed}"
        model = adapted(NASLoRAConfig(task_type="SEQ_CLS", r=4), "bert", seed)
        trainer(model, arguments(run)).train()
        model.save_pretrained(run / "adapter")
        folders.append(run / "adapter")
    yield folders


def test_trained_adapters(tmp_path, trained):
    """Picture and table of trained adapters."""
    out = tmp_path / "new" / "heatmap.png"
    assert said("plot", *trained, "--out", out) == f"Wrote {out}.\n"
    picture = imread(out)
    assert picture.ndim == 3 and picture.std() > 0
    found = {folder.parent.name: read_adapter(folder, base_needed=False) for folder in trained}
    table = architectures.average({name: architectures.read_architecture(own) for name, own in found.items()})
    assert table.budgets == [table.space // 2] * 2
    own = [{(r["module"], r["kind"]): r for r in Architecture.from_pretrained(str(f)).rows()} for f in trained]
    for block, module, kind in (
        ("bert.encoder.layer.1", "output.dense", "low_rank"),
        (OUTSIDE, "pooler.dense", "bias"),
    ):
        name = f"bert.{module}" if block == OUTSIDE else f"{block}.{module}"
        mean = sum(rows[name, kind]["parameters"] / rows[name, kind]["of"] for rows in own) / 2
        shares = table.shares[table.rows.index(block)]
        assert shares[table.columns.index(Column(module, kind))] == pytest.approx(mean)
    assert table.shares[0][table.columns.index(Column("pooler.dense", "bias"))] is None


@pytest.mark.parametrize("settings", [{"r": 0}, {"train_biases": False}, {"parameter_budget": 1}], ids=str)
def test_picture_of_other_search_spaces(tmp_path, settings):
    saved(tmp_path / "adapter", **settings)
    said("plot", tmp_path / "adapter", "--out", tmp_path / "a.png", "--title", "Mine")
    assert imread(tmp_path / "a.png").std() > 0


def test_searching_refused(tmp_path):
    """An adapter in its search is refused."""
    saved(tmp_path / "one", past_search=False)
    with pytest.raises(ValueError, match=r"was saved in its search \(0 of rounds=1 over\)"):
        read(tmp_path / "one")
    saved(tmp_path / "two", rounds=2)
    with pytest.raises(ValueError, match=r"was saved in its search \(1 of rounds=2 over\), so its architecture is no"):
        read(tmp_path / "two")


def test_other_spaces_refused(tmp_path):
    """Adapters of other spaces on disk are refused."""
    saved(tmp_path / "a")
    for name, settings, sentence in (
        ("ranks", {"r": 2}, "has 128 parameters in that of a and 64 parameters in that of ranks"),
        ("granularities", {"granularity": "structured"}, "a is unstructured and granularities is structured"),
        ("models", {"arch": "roberta"}, "in that of a and none in that of models"),
    ):
        saved(tmp_path / name, **settings)
        with pytest.raises(ValueError, match=sentence):
            read(tmp_path / "a", tmp_path / name)
    assert "none in that of models" in refused("plot", tmp_path / "a", tmp_path / "models")
