"""The command `peft-learners` as a whole: help, options, what is missing, and processes of its own."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from console import refused, said
from matplotlib.image import imread
from peft import LoraConfig, PeftModel, get_peft_model
from training import learner
from zoo import logits_of

import peft_learners_cli as command
from peft_learners import BottleneckConfig, LearnerConfig, cli
from peft_learners.hub.full_card import read_adapter

COMMANDS = ("show", "plot", "export", "card", "push")


def process(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What an installed command does, in a process of its own."""
    run = [sys.executable, "-W", "ignore", "-m", "peft_learners_cli", *map(str, words)]
    return subprocess.run(run, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def adapter_in(folder: Path, **fields) -> PeftModel:
    model = learner("bert", init_weights=False, **fields)
    model.save_pretrained(folder)
    return model


def test_entry_point():
    """pyproject.toml names the function, and all that `plot` needs has an extra."""
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\npeft-learners = "peft_learners_cli:main"\n' in project
    assert callable(command.main) and re.search(r'^plot = \["matplotlib[^"]*"\]$', project, re.M)


def test_help(capsys):
    """Each subcommand has its help."""
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(re.search(rf"^    {name} ", out, re.M) for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            command.main([name, "--help"])
        assert end.value.code == 0 and f"usage: peft-learners {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert capsys.readouterr().out == f"peft-learners {importlib.metadata.version('peft-learners')}\n"


def test_help_is_quick():
    """Help and wrong arguments need none of the libraries that take seconds to import."""
    code = "import sys, peft_learners_cli as c; c.make_parser(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "peft", "transformers", "huggingface_hub", "peft_learners"} & set(run.stdout.split())


def test_names_of_options():
    """Options are taken with hyphens and as Python writes them; sentences name them as the command does."""
    for option in ("--base-model", "--base_model"):
        assert command.parse(["card", "here", option, "me/base_model"])[1]["base_model"] == "me/base_model"
    assert command.parse(["export", "a", "b", "--num_labels=3", "--strict_serving"])[1]["num_labels"] == 3
    options = {"base_model", "rank", "update", "create_pr"}
    for sentence, expected in (
        ('Give its id: `base_model="OWNER/NAME"`.', "Give its id: --base-model OWNER/NAME."),
        ("Give `update=True` or `create_pr=True`.", "Give --update or --create-pr."),
        ("give it with `base_model=`.", "give it with --base-model."),
        ("Say rank=64 (the rank) or rank=0.99.", "Say --rank 64 (the rank) or --rank 0.99."),
        ("LearnerConfig(r=4), `picture=` and fold_rank=2", "LearnerConfig(r=4), `picture=` and fold_rank=2"),
    ):
        assert cli.with_options(sentence, options).rstrip(".") == expected.rstrip(".")


def test_values_of_options():
    """What export's own advice names is taken: a rank, or a share of the energy."""
    found = [
        command.parse(["export", "a", "b", "--rank", word])[1]["rank"] for word in ("64", "0.99", ".5", "1.0", "1e-1")
    ]
    assert found == [64, 0.99, 0.5, 1.0, 0.1] and [type(rank) for rank in found] == [int, *[float] * 4]
    for parse, word in ((command.parse_rank, "all"), (command.parse_count, "-1"), (command.parse_width, "dense")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '{word}'"):
            parse(word)


def test_export_takes_its_advice(tmp_path: Path, monkeypatch):
    """The command that the error names works: with 0.99 of the energy the export does almost the same."""
    monkeypatch.chdir(tmp_path)
    zoo.build("bert").save_pretrained("base")
    base = type(zoo.build("bert")).from_pretrained(Path("base").resolve())
    model = get_peft_model(base, LearnerConfig(r=4, init_weights=False, task_type="SEQ_CLS")).eval()
    model.save_pretrained("mine")
    advice = refused("export", "mine", "as-lora")
    (share,) = re.findall(r"--rank (0\.\d+)", advice)
    assert "--rank 64 " in advice
    out = said("export", "mine", "as-lora", "--rank", share)
    assert "largest error" in out and "Wrote as-lora. It loads with PEFT alone" in out
    again = PeftModel.from_pretrained(type(base).from_pretrained("base"), "as-lora")
    assert isinstance(again.peft_config["default"], LoraConfig)
    inputs = zoo.inputs_of("bert", model)
    expected = logits_of(model, inputs)
    # The error of each of 8 layers is at most 0.1 of its update.
    assert 0 < (logits_of(again, inputs) - expected).abs().max() < 0.1 * expected.abs().max()
    assert refused("export", "mine", "as-lora", "--rank", "1.5").endswith("(1.0: all), got 1.5.")


def test_plot_learners(tmp_path: Path):
    """Ranks of Learners, and kept energies below them where one was folded."""
    from peft_learners.cli import ranks

    model = adapter_in(tmp_path / "one", rank_pattern={"output.dense": 3})
    out = tmp_path / "new" / "ranks.svg"
    assert said("plot", tmp_path / "one", "--out", out) == f"Wrote {out}.\n" and "<svg" in out.read_text()
    config = model.peft_config["default"]
    layers = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    config.completed_phases, config.after_priming = ["priming"], "fold"
    config.kept_energy = dict(zip(layers, (0.25, 0.75), strict=True))
    adapter = read_adapter(tmp_path / "one", base_needed=False)
    folded = read_adapter(tmp_path / "one", base_needed=False)
    folded.config.kept_energy = config.kept_energy
    figure = ranks.draw_adapters({"one": adapter, "folded": folded}, "Mine", {})
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert set(panels) == {
        "one: rank of the update",
        "folded: rank of the update",
        "folded: share of the energy that folding kept (%)",
    }
    energy = panels["folded: share of the energy that folding kept (%)"]
    assert [text.get_text() for text in energy.texts] == ["25", "75"]
    assert [label.get_text() for label in energy.get_yticklabels()] == ["layer.0", "layer.1"]
    assert (energy.get_xlabel(), energy.get_ylabel()) == ("module", "block")
    drawn = panels["one: rank of the update"]
    column = [label.get_text() for label in drawn.get_xticklabels()].index("output.dense")
    assert drawn.images[0].get_array()[0, column] == 3 and figure._suptitle.get_text() == "Mine"


def test_plot_refusals(tmp_path: Path, monkeypatch):
    """Adapters that can't be drawn, or not together, are one sentence."""
    monkeypatch.chdir(tmp_path)
    adapter_in(Path("learner"))
    bottleneck = get_peft_model(zoo.build("bert"), BottleneckConfig(bottleneck_dim=2, task_type="SEQ_CLS"))
    bottleneck.save_pretrained("bottleneck")
    get_peft_model(zoo.build("bert"), LoraConfig(target_modules=["query"])).save_pretrained("lora")
    assert refused("plot", "bottleneck").startswith("There is nothing to draw of a bottleneck adapter: ")
    assert refused("plot", "learner", "lora").endswith("it holds an adapter of type LORA.")
    together = "learner is a Learner adapter and bottleneck is a bottleneck adapter. Draw them one by one."
    assert refused("plot", "learner", "bottleneck").endswith(together)
    assert refused("plot", "learner", "--out", "a.txt") == "--out must end in .png, .svg or .pdf, got a.txt."
    assert not list(Path().glob("*.png"))
    said("plot", "learner")
    assert imread("learner.png").std() > 0


@pytest.mark.slow
def test_missing_matplotlib(tmp_path: Path):
    """Without matplotlib `plot` says what to install, and the others work."""
    adapter_in(tmp_path / "mine")
    missing = tmp_path / "without" / "matplotlib"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    path = os.pathsep.join([str(missing.parent), *sys.path])
    found = process("plot", "mine", cwd=tmp_path, PYTHONPATH=path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    last = found.stderr.splitlines()[-1]
    assert last == 'peft-learners: error: plot needs matplotlib: pip install "peft-learners[plot]"'
    assert "Learner adapter" in process("show", "mine", cwd=tmp_path, PYTHONPATH=path).stdout


@pytest.mark.slow
def test_from_an_empty_folder(tmp_path: Path):
    """A process that has imported nothing else knows the adapter; a wrong one ends without a traceback."""
    adapter_in(tmp_path / "mine")
    path = os.pathsep.join(sys.path)
    (tmp_path / "empty").mkdir()
    found = process("show", tmp_path / "mine", cwd=tmp_path / "empty", PYTHONPATH=path)
    assert found.returncode == 0 and re.search(r"^priming +current ", found.stdout, re.M)
    found = process("card", "nowhere", cwd=tmp_path / "empty", PYTHONPATH=path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("peft-learners: error: nowhere must be the folder of")
