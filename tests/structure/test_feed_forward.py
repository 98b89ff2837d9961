"""Feed-forward pairs are found by structure, over architectures."""

from __future__ import annotations

import pytest
import zoo
from architectures import OTHERS

from peft_learners.far.plan import named_feed_forwards, patterns_of
from peft_learners.structure.feed_forward import feed_forwards

#: Architecture: pairs of two blocks each (counted by hand), endings of their names, hidden units.
ZOO = {
    "distilbert": (2, [["lin1", "lin2"]], 32),
    "bert": (2, [["intermediate.dense", "output.dense"]], 32),
    "roberta": (2, [["intermediate.dense", "output.dense"]], 32),
    # the block's own pair and that of its one extra FFN; the bottlenecks are none
    "mobilebert": (4, [["intermediate.dense", "output.dense"]], 32),
    "albert": (1, [["ffn", "ffn_output"]], 32),
    "gpt2": (2, [["c_fc", "c_proj"]], 64),
    "llama": (2, [["gate_proj", "up_proj", "down_proj"]], 32),
    "t5": (4, [["wi", "wo"]], 32),
    "vit": (2, [["fc1", "fc2"]], 32),
}


def check(model, count: int, patterns: list, width: int) -> None:
    pairs = feed_forwards(model)
    assert len(pairs) == count
    assert patterns_of(pairs) == patterns
    assert all(pair.width == width for pair in pairs)
    if pairs:
        assert named_feed_forwards(model, patterns) == pairs


@pytest.mark.parametrize("arch", list(zoo.ZOO))
def test_zoo(arch):
    """Pairs of the zoo's models are found."""
    check(zoo.build(arch), *ZOO[arch])


@pytest.mark.parametrize("arch", list(OTHERS))
def test_other_architectures(arch):
    """Pairs of other architectures are found."""
    cls, config, *expected = OTHERS[arch]
    check(cls(config), *expected)
