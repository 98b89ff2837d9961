"""A method is one folder: one that this test writes, outside the package, goes through all that ours go through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forks import Warm

ROOT = Path(__file__).resolve().parents[2]
TOY = {
    "config.py": '''
from dataclasses import dataclass
from typing import ClassVar

from peft_learners.config import Check, PhasedConfig, is_positive_int, names_unknown_fields, option


@names_unknown_fields
@dataclass
class ToyConfig(PhasedConfig):
    """Configuration of Toy: LoRA without scaling."""

    method: ClassVar[str] = "toy"
    display_name: ClassVar[str] = "Toy"
    about: ClassVar[str] = "Toys are low-rank modules without a scaling."

    r: int = option(4, "Rank of the toys.", Check(is_positive_int, "a whole number of at least 1", "r=4"))
''',
    "layer.py": '''
from torch import nn

from peft_learners.layers.linear import DeltaLinear


class ToyLinear(DeltaLinear):
    """`y = x (W + B A)^T + b`."""

    adapter_layer_names = ("toy_A", "toy_B")

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.toy_A, self.toy_B = nn.ModuleDict(), nn.ModuleDict()

    def low_rank(self, adapter):
        return (self.value("toy_A", adapter), self.value("toy_B", adapter), 1.0) if adapter in self.toy_A else None
''',
    "model.py": '''
from peft_learners.structure.modules import linear_names
from peft_learners.tuner import PhasedModel

from .layer import ToyLinear


class ToyModel(PhasedModel):
    """Puts toys on every linear layer."""

    prefix = "toy_"
    tuner_layer_cls = ToyLinear

    def _found_targets(self, config, model):
        return linear_names(model)

    def _new_layer(self, module, name):
        return ToyLinear(module)

    def _update_layer(self, layer, adapter, config, name):
        layer.add_parameter("toy_A", adapter, config, config.r, layer.in_features, kaiming=True)
        layer.add_parameter("toy_B", adapter, config, layer.out_features, config.r)
''',
    "__init__.py": '''
"""A toy method."""

from peft_learners.registry import register

from .config import ToyConfig
from .model import ToyModel

register(ToyConfig, ToyModel)
''',
}

CARD = """
from pathlib import Path
import toy, zoo
from peft import PeftModel, get_peft_model
from peft_learners.hub import write_card
from peft_learners_cli import main

folder = Path(sys.argv[1])
model = get_peft_model(zoo.build("distilbert"), toy.ToyConfig(task_type="SEQ_CLS"))
model.save_pretrained(folder)
short = (folder / "README.md").read_text()
(folder / "README.md").unlink()
write_card(folder, base_model="distilbert/distilbert-base-uncased")
main(["show", str(folder)])
PeftModel.from_pretrained(zoo.build("distilbert"), folder)
print(short, (folder / "README.md").read_text())
"""
TABLES = """
import toy
from scripts.docs import field_tables, verbs_table

field_tables.main(sys.argv[1:])
print(verbs_table.table(verbs_table.collect()))
"""


@pytest.fixture
def toy(tmp_path: Path, warm: Warm):
    """Runs code where the folder of the toy method can be imported, and gives what it printed."""
    for name, text in TOY.items():
        (tmp_path / "toy").mkdir(exist_ok=True)
        (tmp_path / "toy" / name).write_text(text.lstrip())
    path = [str(tmp_path), str(ROOT)]

    def run(code: str, *arguments: object) -> str:
        start = f"import os, sys; os.chdir({str(ROOT)!r}); sys.path[:0] = {path}"
        return warm.python(f"{start}\n{code}", *map(str, arguments), log=tmp_path / "log")

    return run


@pytest.mark.slow
def test_contract(toy):
    """The contract's checks run on it, as on ours."""
    options = ("-p", "toy", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-W", "ignore")
    tests = ("tests/contract/test_contract.py", "-k", "toy and (distilbert or llama)")
    out = toy("import pytest; assert pytest.main(sys.argv[1:]) == 0", *options, *tests)
    assert int(out.splitlines()[-1].partition(" passed")[0]) >= 30


@pytest.mark.slow
def test_cards(toy, tmp_path: Path):
    """What is saved has a README, a card can be made of it, `show` tells of it, and all call it by its name."""
    out = toy(CARD, tmp_path / "saved")
    assert "A Toy adapter of" in out and "Toys are low-rank modules without a scaling." in out
    assert out.count("import peft_learners") >= 2
    assert re.search(r"^.*/saved: Toy adapter$", out, re.M) and re.search(r"^attention.q_lin +2 +", out, re.M)


@pytest.mark.slow
def test_tables(toy, tmp_path: Path):
    """Its fields stand in a table, with their help texts, and it has a column among PEFT's verbs."""
    pages = tmp_path / "docs"
    pages.mkdir()
    for name in ("learner", "far", "nas_lora", "bottleneck", "toy"):
        (pages / f"{name}.md").write_text("<!-- fields:begin -->\n<!-- fields:end -->\n")
    out = toy(TABLES, "--docs", pages)
    assert "5 pages" in out and "| Learner | FAR | NAS-LoRA | bottleneck | Toy | tests |" in out
    assert "| `r` | `4` | Rank of the toys. |" in (pages / "toy.md").read_text()
