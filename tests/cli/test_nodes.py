"""Pictures of kept nodes: what is read is what the adapter holds, and overlaps are right."""

from pathlib import Path

import pytest
import torch
import zoo
from console import refused, said
from matplotlib.image import imread
from peft import get_peft_model
from training import save_undriven, sgd

from peft_learners import FARConfig
from peft_learners.cli import nodes
from peft_learners.cli.names import natural, short_names
from peft_learners.hub.full_card import read_adapter
from peft_learners_cli import parse_width

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
    return save_undriven(model, folder)


def read_kept(folder: Path, widths: dict[str, int] | None = None) -> nodes.Kept:
    return nodes.read_kept(read_adapter(folder, base_needed=False), widths or {})


def held(model: torch.nn.Module, layer: str) -> list[int]:
    return model.base_model.model.get_submodule(layer).far_kept["default"].tolist()


def test_hidden_units(tmp_path):
    """Hidden units are read once per FFN."""
    model = saved(tmp_path)
    kept = read_kept(tmp_path)
    assert list(kept) == OUTPUTS
    for layer, (indices, width) in kept.items():
        assert width == 32 and len(indices) == 8
        assert indices == held(model, layer) == held(model, layer.replace("output", "intermediate"))


def test_output_nodes(tmp_path):
    """Output nodes are read of each layer."""
    model = saved(tmp_path, granularity="output_node")
    kept = read_kept(tmp_path)
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
    kept = read_kept(tmp_path)
    assert len(kept) == rows
    for layer, (indices, width) in kept.items():
        assert (width, indices) == (hidden, held(model, layer))


def test_discarded_nodes_need_a_width(tmp_path):
    model = saved(tmp_path, discard_unkept=True)
    with pytest.raises(ValueError, match=r"does not tell how many nodes .*output\.dense has: with discard_unkept"):
        read_kept(tmp_path)
    for widths in ({"": 32}, {"output.dense": 32, "": 5}):
        assert read_kept(tmp_path, widths) == {layer: (held(model, layer), 32) for layer in OUTPUTS}
    last = held(model, OUTPUTS[0])[-1]
    with pytest.raises(ValueError, match=f"keeps node {last}, so it must have more than {last} nodes"):
        read_kept(tmp_path, {"": last})
    assert dict(map(parse_width, ["1536", "output.dense=384"])) == {"": 1536, "output.dense": 384}
    assert refused("plot", tmp_path, "--width", "output.dense=").endswith("got 'output.dense='")
    out = tmp_path / "nodes.png"
    said("plot", tmp_path, "--width", "5", "--width", "output.dense=32", "--out", out)
    assert imread(out).std() > 0


def test_file_over_width(tmp_path):
    """The file is believed before the width."""
    saved(tmp_path)
    assert {width for _, width in read_kept(tmp_path, {"": 99}).values()} == {32}


def test_priming_refused(tmp_path):
    """An adapter in priming has no nodes."""
    saved(tmp_path, past_boundary=False)
    with pytest.raises(ValueError, match="saved before its nodes were selected"):
        read_kept(tmp_path)


def test_overlap():
    first = {"a": ([0, 1, 2, 3], 16), "b": ([5], 4), "only here": ([1], 4)}
    second = {"a": ([2, 3, 9, 15, 14], 16), "b": ([0, 1], 4), "only there": ([1], 4)}
    # a: 2 and 3 of five, and four of 16 by chance; b: none of two, one of four.
    assert nodes.overlaps(first, second) == {
        "a": nodes.Overlap(0.4, 0.25),
        "b": nodes.Overlap(0.0, 0.25),
    }
    with pytest.raises(ValueError, match="a has 16 nodes in the first adapter and 17 in the second"):
        nodes.overlaps(first, {"a": ([0], 17)})
    with pytest.raises(ValueError, match="no layer in common"):
        nodes.overlaps(first, {"c": ([0], 17)})


def test_short_names():
    assert short_names(OUTPUTS) == ["layer.0", "layer.1"]
    assert short_names(OUTPUTS[:1]) == OUTPUTS[:1]
    assert short_names([INPUTS[0], OUTPUTS[0]]) == ["intermediate", "output"]
    assert short_names(["h.2.mlp.c", "h.10.mlp.c", "h.2.x.c"]) == ["h.2.mlp", "h.10.mlp", "h.2.x"]
    assert sorted(["h.10.c", "h.2.d", "h.2.c"], key=natural) == ["h.2.c", "h.2.d", "h.10.c"]


def texts(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_picture(tmp_path, number):
    folders = [tmp_path / f"adapter-{seed}" for seed in range(number)]
    models = [saved(folder, seed=seed) for seed, folder in enumerate(folders)]
    out = tmp_path / "new" / "nodes.png"
    assert said("plot", *folders, "--out", out) == f"Wrote {out}.\n"
    picture = imread(out)
    assert picture.ndim == 3 and picture.std() > 0
    adapters = {folder.name: read_adapter(folder, base_needed=False) for folder in folders}
    figure = nodes.draw_adapters(adapters, None, {})
    assert "adapter-0: 25% of the hidden units kept (selection: l1)" in texts(figure)
    assert {"layer", "index of the hidden unit"} <= {*texts(figure)}
    beside = [text.get_text().strip() for text in figure.axes[-1].texts]
    assert len(beside) == (3 if number == 2 else 0)
    if number == 2:
        share = len({*held(models[0], OUTPUTS[0])} & {*held(models[1], OUTPUTS[0])}) / 8
        assert beside == [f"{share:.0%} (chance 25%)", beside[1], "kept above too"]
