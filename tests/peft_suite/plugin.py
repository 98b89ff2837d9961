"""pytest plugin: PEFT's tests that are parametrised over configs get ours in their place; all others are left out.

    cd SUITE && PYTHONPATH=tests:tests/support python -m pytest -p peft_suite.plugin tests/test_custom_models.py

A parametrisation is known by its module and the names of its arguments.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import sys
import tempfile
import types
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jinja2
import pytest
import torch
import transformers as tf

from peft_suite import models, peft_cases
from peft_suite.skips import with_lift

if importlib.util.find_spec("diffusers") is None:
    # PEFT's helpers ask whether a model is a diffusion pipeline; none is.
    pipelines = types.ModuleType("diffusers")
    pipelines.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = pipelines

# Each save writes a model card, and its template takes as long to compile as all the rest of the save.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]

Row = tuple[str, tuple[Any, ...]]  # name of the case, values of the arguments

#: Of the modules, or classes, whose tests load models of one family.
FAMILY = {
    "test_decoder_models": "decoder",
    "test_encoder_decoder_models": "encoder-decoder",
    "test_feature_extraction_models": "encoder",
    "test_seq_classifier": "sequence classification",
    "TestTokenClassificationModels": "token classification",
    "TestQuestionAnsweringModels": "question answering",
}
#: Parametrised over configs too, but of what only some of PEFT's own tuners have.
NOT_FOR_PLUGINS = (
    "test_add_weighted_adapter_cat_with_rank_pattern",  # makes a LoraConfig, whatever it is given
    "test_default_target_modules_*",  # a table of PEFT's, by the type of the model
    "test_inject_adapter_in_model_rejects_shared_state_tuners",  # weights that several layers share
    "test_base_model_module_named_like_peft_prefix",  # has a table of prefixes in its body
    "test_prompt_learning_*",
    "test_mixed_adapter_batches_mha_raises",  # asks for the words "lora.MultiheadAttention"
)
# PEFT's tests want a card that names the base model by what it was loaded from, and ours name no local folder.
_cache = tempfile.TemporaryDirectory(prefix="peft-suite-models-")
huggingface_hub.constants.HF_HUB_CACHE = _cache.name
_ours: set[str] = set()


def _paths(family: str) -> list[str]:
    """Ids of a family's models. They are in the cache, so that PEFT's tests need not ask the Hub for them once."""
    ids = models.saved(family, Path(_cache.name))
    if tests := sys.modules.get("tests.testing_utils"):
        tests._HUB_MODEL_ACCESSES.update(dict.fromkeys(ids, 1))
    return ids


def _auto_models() -> Iterator[Row]:
    classes = {
        "decoder": tf.AutoModelForCausalLM,
        "encoder": tf.AutoModel,
        "encoder-decoder": tf.AutoModelForSeq2SeqLM,
        "sequence classification": tf.AutoModelForSequenceClassification,
    }
    for family, auto in classes.items():
        for path in _paths(family):
            yield Path(path).name, ((auto, path),)


def _rows(module: str, family: str | None, test: str, names: tuple[str, ...]) -> tuple[list[Row] | None, bool]:
    """What to put in the place of a parametrisation (None: leave it), and whether configs are among it."""
    match module, names:
        case _, ("model_id",) if family:
            return [(Path(path).name, (path,)) for path in _paths(family)], False
        case _, ("config_cls", "config_kwargs") if family:
            return [(name, (cls, fields)) for name, model, cls, fields in peft_cases.cases() if model == family], True
        case "test_custom_models", ("test_name", "model_id", "config_cls", "config_kwargs"):
            custom = [case for case in peft_cases.cases() if case[1] not in models.FAMILIES]
            return [(case[0], case) for case in custom], True
        case "test_custom_models", ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
            return [(pair[0], pair) for pair in peft_cases.pairs()], True
        case "test_custom_models", ("test_name", "config0", "config1"):
            return [(pair[0], pair) for pair in peft_cases.mixed(test)], True
        case "test_custom_models", ("test_name", "config"):
            return [(name, (name, config)) for name, config in peft_cases.single()], True
        case "test_custom_models", ("config0",):
            return [(name, (config,)) for name, config in peft_cases.single()], True
        case "test_custom_models" | "test_config", ("config_cls",) | ("config_class",):
            return [(name, (cls,)) for name, cls in peft_cases.CLASSES.items()], True
        case "test_config", ("config_class", "mandatory_kwargs"):
            return [(name, (cls, {})) for name, cls in peft_cases.CLASSES.items()], True
        case "test_other", ("config_cls", "config_kwargs"):
            return [(name, (cls, fields)) for name, cls, fields in peft_cases.by_regex()], True
        case "test_low_level_api", ("model_cls_and_id",):
            return list(_auto_models()), False
        case "test_low_level_api", ("config",):
            return [(name, (cls(),)) for name, cls in peft_cases.CLASSES.items()], True
    return None, False


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    test = metafunc.function.__name__
    if any(fnmatch(test, pattern) for pattern in NOT_FOR_PLUGINS):
        return
    family = FAMILY.get(module) or FAMILY.get(metafunc.cls.__name__ if metafunc.cls else "")
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names = tuple(name.strip() for name in mark.args[0].split(","))
        rows, of_configs = _rows(module, family, test, names)
        if rows is None:
            continue
        parameters = [pytest.param(*values, id=name) for name, values in rows]
        marks[i] = pytest.mark.parametrize(mark.args[0], parameters).mark
        if of_configs:
            _ours.add(metafunc.definition.nodeid)


def _chosen(item: pytest.Item) -> bool:
    if item.nodeid.partition("[")[0] not in _ours:
        return False
    module, own = item.path.stem, getattr(item, "cls", None)
    family = FAMILY.get(module) or FAMILY.get(own.__name__ if own else "")
    values = item.callspec.params  # type: ignore[attr-defined]
    if family is None or not {"model_id", "config_kwargs"} <= values.keys():
        return True
    paths = _paths(family)
    model = paths.index(values["model_id"])
    return peft_cases.covered(family, values["config_cls"], values["config_kwargs"], model, len(paths))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [_chosen(item) for item in items]
    config.hook.pytest_deselected(items=[item for item, its in zip(items, chosen, strict=True) if not its])
    items[:] = [item for item, its in zip(items, chosen, strict=True) if its]
    for item in items:
        test, _, case = item.name.partition("[")
        reason = peft_cases.skipped(test, case.removesuffix("]"))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that was imported is no garbage, and looking through it again and again takes a while


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # some of PEFT's tests draw without a seed: what they draw must not depend on their order


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        report.longrepr = (path, line, with_lift(reason))
    return report


def pytest_unconfigure() -> None:
    _cache.cleanup()
