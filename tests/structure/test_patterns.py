from __future__ import annotations

import re
import time

import pytest

from peft_learners.structure.patterns import fault_of

#: Of a layer deep in a model, and some that regexes take long for.
NAMES = ["model.language_model.layers.17.self_attn.q_proj.layernorm_embeddings", "a" * 100, "a.b." * 25]


@pytest.mark.parametrize(
    "regex",
    [
        "q_lin",
        "distilbert.transformer.layer.0.attention.q_lin",
        r".*layers\.(1[0-9]|2[0-9])\..*proj",
        r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
        r".*\.encoder\..*\.layer\..*\.attention\..*",
        r"(?!.*vision).*\.(q_proj|v_proj)",
        r"^(?!.*(lm_head|classifier)).*",
        r"(model\.)?(language_model\.)?layers\.[0-9]+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        # as a well-known package writes it
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r"\.(?:(?:q_proj|k_proj|v_proj)))",
        "|".join(rf"model\.layers\.{i}\.mlp\.{part}_proj" for i in range(80) for part in ("gate", "up", "down")),
    ],
)
def test_usual(regex):
    """What people write is taken, and is quick."""
    assert fault_of(regex) == ""
    begin = time.perf_counter()
    for name in NAMES:
        re.fullmatch(regex, name)
        re.match(rf"(.*\.)?({regex})$", name)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("regex", "words"),
    [
        ("(a+)+$", "has several ways to match"),
        ("(a|aa)*b", "has several ways to match"),
        ("(a|a)*b", "has several ways to match"),
        ("((a+)+)?b", "has several ways to match"),
        ("(?=(a+)+)b", "has several ways to match"),
        (r"(\w+\w)*z", "has several ways to match"),
        ("(?:a{1,30}){1,30}b", "has several ways to match"),
        ("(?:(?:(?:){60000}){60000})", "has several ways to match"),
        (".*.*.*.*.*.*x", "too many repeats"),
        ("(a?){30}b", "too many repeats"),
        (".?" * 30 + "x", "too many repeats"),
        ("(.|.)" * 30 + "x", "too many repeats"),
        ("(", "is no regex"),
        ("a{1,5000000000}", "is no regex"),
        ("(" * 3000 + ")" * 3000, "nested too deeply"),
    ],
)
def test_endless(regex, words):
    """What could take for ever is told, and why."""
    assert words in fault_of(regex)


@pytest.mark.parametrize("regex", ["x" * 50_000, "x?" * 25_000, "(ab?)" * 10_000, "a?" + "x" * 49_000])
def test_long(regex):
    """Looking at a long regex takes a time that grows as it does: some tenths of a second on a free machine."""
    begin = time.perf_counter()
    fault_of(regex)
    assert time.perf_counter() - begin < 20


def test_too_long():
    assert fault_of("x" * 50_001) == "has 50,001 characters, more than 50,000"


def test_many_ways_before_endless():
    assert "has several ways to match" in fault_of("x?" * 2000 + "(a+)+")
