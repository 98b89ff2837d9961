"""`scripts/glue/plot_nodes.py`: what it reads is what the adapter holds, and overlaps are right."""

import warnings
from pathlib import Path

import pytest
import torch
import zoo
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from training import sgd

from peft_learners import FARConfig
from scripts.glue import plot_nodes

OUTPUTS = [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
INPUTS = [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]


def saved(
    folder: Path, arch: str = "bert", *, seed: int = 0, past_boundary: bool = True, **settings
) -> torch.nn.Module:
    """An adapter with a quarter of the nodes kept after noise on all weights, saved to `folder`."""
    settings = {"priming_steps": 1, "retention_ratio": 0.25, "task_type": zoo.ZOO[arch].task_type, **settings}
    model = get_peft_model(zoo.build(arch), FARConfig(**settings))
    model.base_model.set_schedule(total_steps=5, optimizer=sgd(model))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    if past_boundary:
        model.base_model.update_and_allocate(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*phases were never driven")
        model.save_pretrained(folder)
    return model


def held(model: torch.nn.Module, layer: str) -> list[int]:
    return model.base_model.model.get_submodule(layer).far_kept["default"].tolist()


def test_hidden_units(tmp_path):
    """Hidden units are read once per FFN."""
    model = saved(tmp_path)
    kept = plot_nodes.read_kept(tmp_path)
    assert list(kept) == OUTPUTS
    for layer, (indices, width) in kept.items():
        assert width == 32 and len(indices) == 8
        assert indices == held(model, layer) == held(model, layer.replace("output", "intermediate"))


def test_output_nodes(tmp_path):
    """Output nodes are read of each layer."""
    model = saved(tmp_path, granularity="output_node")
    kept = plot_nodes.read_kept(tmp_path)
    assert list(kept) == [INPUTS[0], OUTPUTS[0], INPUTS[1], OUTPUTS[1]]
    for layer, (indices, width) in kept.items():
        assert indices == held(model, layer)
        assert (width, len(indices)) == ((32, 8) if layer in INPUTS else (16, 4))


@pytest.mark.parametrize(
    "arch,rows,hidden",
    [("gpt2", 2, 4 * 16), ("llama", 2, 32), ("t5", 2 + 2, 32), ("albert", 1, 32), ("mobilebert", 2 * 2, 32)],
)
def test_other_architectures(tmp_path, arch, rows, hidden):
    # Llama: gate, up and down are one row; T5 has encoder and decoder, ALBERT one block, MobileBERT two FFNs a block.
    model = saved(tmp_path, arch)
    kept = plot_nodes.read_kept(tmp_path)
    assert len(kept) == rows
    for layer, (indices, width) in kept.items():
        assert (width, indices) == (hidden, held(model, layer))


def test_discarded_nodes_need_a_width(tmp_path):
    model = saved(tmp_path, discard_unkept=True)
    with pytest.raises(ValueError, match=r"does not tell how many nodes .*output\.dense has: with discard_unkept"):
        plot_nodes.read_kept(tmp_path)
    for widths in ({"": 32}, {"output.dense": 32, "": 5}):
        assert plot_nodes.read_kept(tmp_path, widths) == {layer: (held(model, layer), 32) for layer in OUTPUTS}
    last = held(model, OUTPUTS[0])[-1]
    with pytest.raises(ValueError, match=f"keeps node {last}, so it must have more than {last} nodes"):
        plot_nodes.read_kept(tmp_path, {"": last})
    assert dict(map(plot_nodes.parse_width, ["1536", "output.dense=384"])) == {"": 1536, "output.dense": 384}
    with pytest.raises(SystemExit):
        plot_nodes.main([str(tmp_path), "--width", "output.dense="])


def test_file_over_width(tmp_path):
    """The file is believed before the width."""
    saved(tmp_path)
    assert {width for _, width in plot_nodes.read_kept(tmp_path, {"": 99}).values()} == {32}


def test_priming_refused(tmp_path):
    """An adapter in priming has no nodes."""
    saved(tmp_path, past_boundary=False)
    with pytest.raises(ValueError, match="saved before its nodes were selected"):
        plot_nodes.read_kept(tmp_path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of a saved adapter, but has no adapter_config.json"):
        plot_nodes.read_kept(tmp_path)
    get_peft_model(zoo.build("bert"), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a FAR adapter, got one of type 'LORA'"):
        plot_nodes.read_kept(tmp_path)


def test_overlap():
    first = {"a": ([0, 1, 2, 3], 16), "b": ([5], 4), "only here": ([1], 4)}
    second = {"a": ([2, 3, 9, 15, 14], 16), "b": ([0, 1], 4), "only there": ([1], 4)}
    # a: 2 and 3 of five, and four of 16 by chance; b: none of two, one of four.
    assert plot_nodes.overlaps(first, second) == {
        "a": plot_nodes.Overlap(0.4, 0.25),
        "b": plot_nodes.Overlap(0.0, 0.25),
    }
    with pytest.raises(ValueError, match="a has 16 nodes in the first adapter and 17 in the second"):
        plot_nodes.overlaps(first, {"a": ([0], 17)})
    with pytest.raises(ValueError, match="no layer in common"):
        plot_nodes.overlaps(first, {"c": ([0], 17)})


def test_short_names():
    assert plot_nodes.short_names(OUTPUTS) == ["layer.0", "layer.1"]
    assert plot_nodes.short_names(OUTPUTS[:1]) == OUTPUTS[:1]
    assert plot_nodes.short_names([INPUTS[0], OUTPUTS[0]]) == ["intermediate", "output"]
    assert plot_nodes.short_names(["h.2.mlp.c", "h.10.mlp.c", "h.2.x.c"]) == ["h.2.mlp", "h.10.mlp", "h.2.x"]
    assert sorted(["h.10.c", "h.2.d", "h.2.c"], key=plot_nodes.natural) == ["h.2.c", "h.2.d", "h.10.c"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_picture(tmp_path, capsys, number):
    folders = [tmp_path / f"adapter-{seed}" for seed in range(number)]
    models = [saved(folder, seed=seed) for seed, folder in enumerate(folders)]
    out = tmp_path / "new" / "nodes.png"
    plot_nodes.main([*map(str, folders), "--out", str(out)])
    picture = imread(out)
    assert picture.ndim == 3 and picture.shape[1] == 1300 and picture.std() > 0
    assert plot_nodes.title_of(folders[0]) == "adapter-0: 25% of nodes (hidden_unit), selection l1"
    printed = capsys.readouterr().out
    assert ("by chance 25.0%" in printed) == (number == 2)
    if number == 2:
        share = len({*held(models[0], OUTPUTS[0])} & {*held(models[1], OUTPUTS[0])}) / 8
        assert f"{OUTPUTS[0]}: {share:.1%} kept by both" in printed
