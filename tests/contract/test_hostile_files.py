"""Broken and hostile adapter files: what can't be is refused before anything of it is taken, whichever way it is
loaded, and what is odd but possible is named in a warning."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import trained_once
from tuners import TUNERS
from zoo import logits_of

from peft_learners.registry import methods

ARCH, FILE, CONFIG = "bert", "adapter_model.safetensors", "adapter_config.json"
Values = dict[str, Tensor]
Damage = Callable[[Values], Values]
ONE_OF_EACH = ("learner", "far", "nas-unstructured", "bottleneck-sequential")
WITH_INDICES = ("far", "far-output-node", "nas-structured", "nas-unstructured")


@functools.cache
def saved(tuner: str) -> tuple[Path, Values]:
    """A folder with a trained adapter, and what its file holds."""
    folder = Path(tempfile.mkdtemp())
    trained_once(tuner, ARCH).model.save_pretrained(folder)
    return folder, load_file(folder / FILE)


def damaged(tuner: str, damage: Damage, folder: Path) -> Path:
    """The same with damaged values."""
    original, values = saved(tuner)
    shutil.copy(original / CONFIG, folder / CONFIG)
    save_file({key: value.contiguous() for key, value in damage(dict(values)).items()}, folder / FILE)
    return folder


def base_and_inputs(tuner: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    run = trained_once(tuner, ARCH)
    return copy.deepcopy(run.base), run.inputs


# -- ways to load ---------------------------------------------------------------------------------------------------


class Way:
    """A model and a way to load a file into it; it can tell afterwards whether the model is as it was."""

    def __init__(self, tuner: str, how: str) -> None:
        self.how = how
        self.base, self.inputs = base_and_inputs(tuner)
        self.plain = logits_of(self.base, self.inputs)
        self.values = [(value, value.clone()) for value in self.base.state_dict().values()]
        self.model: Any = None
        if how in ("second", "over", "state dict"):
            self.model = PeftModel.from_pretrained(self.base, saved(tuner)[0])
        elif how == "over a fresh one":
            self.model = get_peft_model(self.base, TUNERS[tuner].config(task_type=zoo.ZOO[ARCH].task_type))
        if self.model is not None:
            self.before = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.config = self.model.peft_config["default"].to_dict()
            self.logits = logits_of(self.model, self.inputs)

    def load(self, folder: Path) -> Any:
        if self.how == "from_pretrained":
            self.model = PeftModel.from_pretrained(self.base, folder)
        elif self.how == "second":
            if "second" in self.model.peft_config:  # a refused one stays, fresh, as PEFT's own do
                self.model.delete_adapter("second")
            self.model.load_adapter(folder, "second")
            self.model.set_adapter("second")
        elif self.how == "state dict":
            set_peft_model_state_dict(self.model, load_file(folder / FILE))
        else:
            self.model.load_adapter(folder, "default")
        return self.model

    def assert_unchanged(self) -> None:
        assert all(torch.equal(value, before) for value, before in self.values)
        if self.model is None:  # PEFT has put layers into the base model by then
            switch(self.base, False)
            assert torch.equal(logits_of(self.base, self.inputs), self.plain)
            return
        after = self.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in self.before.items())
        assert self.model.peft_config["default"].to_dict() == self.config
        assert torch.equal(logits_of(self.model, self.inputs), self.logits)
        with self.model.disable_adapter():
            assert torch.equal(logits_of(self.model, self.inputs), self.plain)


def switch(model: torch.nn.Module, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(on)


WAYS = ("from_pretrained", "second", "over", "over a fresh one", "state dict")
every_way = pytest.mark.parametrize("how", WAYS)
#: What all of them share.
three_ways = pytest.mark.parametrize("how", ("from_pretrained", "over a fresh one", "state dict"))


def assert_refused(tuner: str, how: str, damages: dict[str, tuple[Damage, str]], tmp_path: Path) -> None:
    """Each of these files is refused with these words, and nothing of the model changes."""
    way = None
    for number, (name, (damage, words)) in enumerate(damages.items()):
        way = Way(tuner, how) if way is None or how == "from_pretrained" else way
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged(tuner, damage, folder)
        with pytest.raises(ValueError, match=words) as error:
            way.load(folder)
        assert "Nothing was loaded" in str(error.value), name
        way.assert_unchanged()


def replaced(key: str, new: Callable[[Tensor], Tensor]) -> Damage:
    """Another value for the first key that ends so."""

    def damage(values: Values) -> Values:
        found = next(name for name in values if name.endswith(key))
        return {**values, found: new(values[found].clone())}

    return damage


def added(key: str, value: Tensor) -> Damage:
    return lambda values: {**values, key: value}


# -- positions and indices --------------------------------------------------------------------------------------------


def put(place: int, number: int) -> Callable[[Tensor], Tensor]:
    def new(value: Tensor) -> Tensor:
        value[place] = number
        return value

    return new


def index_damages(key: str) -> dict[str, tuple[Damage, str]]:
    outside = r"must be ascending whole numbers from 0 to \d+, got {}"
    cases: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "negative": (put(0, -1), outside.format("-1")),
        "all negative": (lambda v: torch.full_like(v, -1), outside.format("-1")),
        "far negative": (lambda v: put(0, -(2**62))(v.long()), outside.format("-4611686018427387904")),
        "far out of range": (put(-1, 1_000_000), outside.format("1000000")),
        "as float": (lambda v: v.float(), "must hold whole numbers, got torch.float32"),
        "NaN": (lambda v: torch.full(v.shape, torch.nan), "must hold whole numbers, got torch.float32"),
        "as bool": (lambda v: v.bool(), "must hold whole numbers, got torch.bool"),
    }
    return {name: (replaced(key, new), words) for name, (new, words) in cases.items()}


INDEX_KEYS = {
    "far": ".far_kept",
    "far-output-node": ".far_kept",
    "nas-structured": ".nas_lora_bias_positions",
    "nas-unstructured": ".nas_lora_U_positions",
}


@every_way
@pytest.mark.parametrize("tuner", WITH_INDICES)
def test_indices(tuner, how, tmp_path: Path):
    """Indices that can't be are refused, with module, value and range."""
    assert_refused(tuner, how, index_damages(INDEX_KEYS[tuner]), tmp_path)


def count_of(tuner: str, key: str) -> int:
    """The number that indices must lie below: counted by hand from the model, of width 16 and 32."""
    return {"far": 32, "far-output-node": 32, "nas-unstructured": 16 * 4}[tuner]


@every_way
@pytest.mark.parametrize("tuner", WITH_INDICES)
def test_shape_of_indices(tuner, how, tmp_path: Path):
    """Indices of another shape are refused, too."""
    damages: dict[str, tuple[Damage, str]] = {
        "one number": (replaced(INDEX_KEYS[tuner], lambda v: v.flatten()[0]), "shapes differ|values are missing"),
        "a matrix": (replaced(INDEX_KEYS[tuner], lambda v: v.unsqueeze(0)), "shapes differ"),
        "more": (
            replaced(INDEX_KEYS[tuner], lambda v: torch.arange(len(v) + 1, dtype=v.dtype)),
            "shapes differ|0 to 0|must keep the nodes",
        ),
    }
    assert_refused(tuner, how, damages, tmp_path)


@every_way
@pytest.mark.parametrize("tuner", ["far", "far-output-node", "nas-unstructured"])
def test_order_of_indices(tuner, how, tmp_path: Path):
    """Indices just out of range, twice the same, and unsorted ones are refused."""
    key, words = INDEX_KEYS[tuner], r"must be ascending whole numbers from 0 to \d+, got "
    name = next(n for n in saved(tuner)[1] if n.endswith(key) and len(saved(tuner)[1][n]) > 1)
    count = count_of(tuner, name)
    damages = {
        "by one": (replaced(name, put(-1, count)), f"from 0 to {count - 1}, got {count}"),
        "twice": (replaced(name, lambda v: v[[1, 1, *range(2, len(v))]]), words + r"\["),
        "unsorted": (replaced(name, lambda v: v.flip(0)), words + r"\["),
    }
    assert_refused(tuner, how, damages, tmp_path)


@every_way
def test_different_nodes(how, tmp_path: Path):
    """The two layers of a feed-forward network keep the same nodes."""

    def other(value: Tensor) -> Tensor:
        rest = [i for i in range(32) if i not in value.tolist()]
        return torch.tensor(sorted([rest[0], *value.tolist()[1:]]))

    last = "output.dense.far_kept"
    damages = {"others": (replaced(last, other), r"must keep the nodes that .*intermediate\.dense keeps, got \[")}
    assert_refused("far", how, damages, tmp_path)


@pytest.mark.parametrize("tuner", WITH_INDICES)
def test_transformers_indices(tuner, tmp_path: Path):
    """transformers' own `load_adapter`, which asks nobody, is told too; the base model is as it was."""
    for number, (name, (damage, words)) in enumerate(index_damages(INDEX_KEYS[tuner]).items()):
        if name in ("far negative", "as float", "NaN", "as bool"):
            continue  # transformers casts to int32 before
        model, inputs = base_and_inputs(tuner)
        plain = logits_of(model, inputs)
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=words):
            model.load_adapter(str(damaged(tuner, damage, folder)))
        switch(model, False)
        assert torch.equal(logits_of(model, inputs), plain), name


# -- what is not the adapter's ----------------------------------------------------------------------------------------


def base_values(tuner: str) -> Iterator[tuple[str, Tensor]]:
    """Names, in a model with an adapter, of values that are not the adapter's, with other values for them."""
    model = PeftModel.from_pretrained(base_and_inputs(tuner)[0], saved(tuner)[0])
    state = model.state_dict()
    own = f".{TUNERS[tuner].prefix}"
    for ending in ("word_embeddings", "query", "LayerNorm", "classifier.original_module", "position_embeddings"):
        name = next(n for n in state if ending in n and n.endswith("weight") and own not in n)
        yield name, state[name] + 1


@every_way
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_base_model(tuner, how, tmp_path: Path):
    """A file can't write to the base model, nor to another adapter."""
    words = r"not the adapter's but the model's, which it may not change \(first: {}\).*modules_to_save"
    damages = {
        name: (added(name, value), words.format(name.replace(".", r"\."))) for name, value in base_values(tuner)
    }
    own = next(name for name in saved(tuner)[1] if f".{TUNERS[tuner].prefix}" in name)
    model = PeftModel.from_pretrained(base_and_inputs(tuner)[0], saved(tuner)[0])
    part = own.removesuffix(".weight").removesuffix(".bias")
    in_model = next(n for n in model.state_dict() if n.startswith(f"{part}.default"))
    if how in ("second", "over", "state dict"):  # there is an adapter of that name, in the same form
        damages["in the model's words"] = (
            added(in_model, model.state_dict()[in_model] + 1),
            words.format(".*default.*"),
        )
    assert_refused(tuner, how, damages, tmp_path)


@pytest.mark.verb(
    "model.load_adapter (transformers)",
    limit="without a look at the file but for indices: it can hold weights of the base model, as LoRA's can; load "
    "files of unknown origin with PEFT's",
)
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_transformers_writes_all(tuner, tmp_path: Path):
    """transformers' own `load_adapter` lets a file write to the base model, of which no tuner hears."""
    model, _ = base_and_inputs(tuner)
    name = "bert.embeddings.position_embeddings.weight"
    given = model.get_parameter(name) + 1
    if tuner == "far":  # which adapts it
        name = "bert.embeddings.position_embeddings.base_layer.weight"
    model.load_adapter(str(damaged(tuner, added(f"base_model.model.{name}", given), tmp_path)))
    assert torch.equal(model.get_parameter(name), given)


def test_no_place(tmp_path: Path):
    """Values without a place in the model are left out, with a warning."""
    inputs = trained_once("learner", ARCH).inputs
    folder = damaged("learner", added("base_model.model.nowhere.weight", torch.ones(2)), tmp_path)
    with pytest.warns(UserWarning, match=r"1 values of the checkpoint have no place .*: base_model\.model\.nowhere\."):
        model = PeftModel.from_pretrained(base_and_inputs("learner")[0], folder)
    assert torch.equal(logits_of(model, inputs), trained_once("learner", ARCH).logits)


def test_embeddings_saved(tmp_path: Path):
    """Embeddings that PEFT was told to save beside an adapter load, as long as they are the model's."""
    run = trained_once("learner", ARCH)
    run.model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("word_embeddings" in name for name in load_file(tmp_path / FILE))
    model = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path)
    assert torch.equal(logits_of(model, run.inputs), run.logits)


def test_new_tokens(tmp_path: Path):
    """Rows of tokens that were added to the model come from the file, the others stay the model's."""
    zoo.build(ARCH).save_pretrained(tmp_path / "base")

    def resized() -> torch.nn.Module:
        model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70)
        return model.eval()

    torch.manual_seed(1)
    config = TUNERS["learner"].config(task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(resized(), config)
    inputs = {**zoo.inputs_of(ARCH, model), "input_ids": torch.tensor([[3, 65, 69], [64, 4, 5], [66, 67, 68]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    again = PeftModel.from_pretrained(resized(), tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))

    file = tmp_path / "adapter" / FILE
    values = load_file(file)
    values[next(name for name in values if "word_embeddings" in name)][3, 0] += 1
    save_file(values, file)
    with pytest.raises(ValueError, match="not the adapter's but the model's"):
        PeftModel.from_pretrained(resized(), tmp_path / "adapter")


@every_way
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_head_missing(tuner, how, tmp_path: Path):
    """A file without the head, or a part of it, is refused, as one without any of the adapter's values is."""

    def without(*endings: str) -> Damage:
        return lambda values: {key: value for key, value in values.items() if not key.endswith(endings)}

    words = r"{} of 2 values of the modules that are saved whole .* \(first: base_model\.model\.classifier\.{}\)"
    damages: dict[str, tuple[Damage, str]] = {
        "bias": (without("classifier.bias"), words.format(1, "bias")),
        "all": (without("classifier.weight", "classifier.bias"), words.format(2, "weight")),
        "nothing": (lambda values: {}, "values are missing"),
        "elsewhere": (
            lambda values: {key.replace(".classifier.", ".score."): value for key, value in values.items()},
            words.format(2, "weight"),
        ),
    }
    assert_refused(tuner, how, damages, tmp_path)


def test_head_of_another_tuner(tmp_path: Path):
    """The head of a LoRA beside ours, or in its place, loads as it does without ours."""
    run = trained_once("learner", ARCH)
    torch.manual_seed(5)
    low = get_peft_model(copy.deepcopy(run.base), LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS"))
    with torch.no_grad():
        low.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    low.save_pretrained(tmp_path / "low")
    want = logits_of(low, run.inputs)
    saved("learner")
    model = copy.deepcopy(run.base)
    model.load_adapter(str(saved("learner")[0]), adapter_name="one")
    assert torch.equal(logits_of(model, run.inputs), run.logits)
    model.delete_adapter("one")
    for name in ("one", "low"):
        model.load_adapter(str(tmp_path / "low"), adapter_name=name)
        model.set_adapter(name)
        assert torch.equal(logits_of(model, run.inputs), want)
        config = model.peft_config[name]
        values = load_file(tmp_path / "low" / FILE)
        assert config.peft_type == "LORA"
        set_peft_model_state_dict(model, {k.removeprefix("base_model.model."): v for k, v in values.items()}, name)
        assert torch.equal(logits_of(model, run.inputs), want)


# -- values -----------------------------------------------------------------------------------------------------------


@three_ways
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_other_types(tuner, how, tmp_path: Path):
    """Whole numbers and truth values in place of floating-point ones are refused, in the head too."""
    own = next(n for n, v in saved(tuner)[1].items() if f".{TUNERS[tuner].prefix}" in n and v.is_floating_point())
    kinds = (torch.int8, torch.int64, torch.bool, torch.complex64)
    damages = {
        f"{key} {kind}": (
            replaced(key, functools.partial(torch.Tensor.to, dtype=kind)),
            f"must hold floating-point numbers, got {kind}",
        )
        for key in (own, "classifier.weight")
        for kind in kinds
    }
    assert_refused(tuner, how, damages, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_other_precision(tuner, dtype, tmp_path: Path):
    """Values in another precision are read."""
    run = trained_once(tuner, ARCH)
    folder = damaged(
        tuner, lambda values: {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}, tmp_path
    )
    logits = logits_of(PeftModel.from_pretrained(copy.deepcopy(run.base), folder), run.inputs)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, run.logits, rtol=0, atol=0 if dtype == torch.float64 else 0.05)


@three_ways
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_not_finite(tuner, how, tmp_path: Path):
    """Values that are not finite are loaded, with one warning that names them."""
    keys = [n for n, v in saved(tuner)[1].items() if f".{TUNERS[tuner].prefix}" in n and v.is_floating_point()][:2]

    def damage(values: Values) -> Values:
        for key, number in zip(
            [*keys, "base_model.model.classifier.bias"], [torch.nan, torch.inf, -torch.inf], strict=True
        ):
            values[key] = values[key].clone()
            values[key].view(-1)[0] = number
        return values

    way, folder = Way(tuner, how), damaged(tuner, damage, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = way.load(folder)
    told = [str(w.message) for w in caught if "hold NaN or infinity" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("3 of ") and all(key in told[0] for key in keys)
    assert not torch.isfinite(logits_of(model, way.inputs)).all()


# -- bytes ------------------------------------------------------------------------------------------------------------


def lying_header(data: bytes) -> bytes:
    """The header says that values end where they don't."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = next(key for key in header if key != "__metadata__")
    header[key]["data_offsets"][1] += 10**6
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + data[8 + length :]


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "lying header": lying_header,
    "huge header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"x" * int.from_bytes(data[:8], "little") + data[-100:],
}


@three_ways
@pytest.mark.parametrize("tuner", ONE_OF_EACH)
def test_broken_bytes(tuner, how, tmp_path: Path):
    """A file that can't be read leaves the model as it was."""
    way, original = None, saved(tuner)[0]
    shutil.copy(original / CONFIG, tmp_path / CONFIG)
    for breaks in BYTES.values():
        way = Way(tuner, how) if way is None or how == "from_pretrained" else way
        (tmp_path / FILE).write_bytes(breaks((original / FILE).read_bytes()))
        with pytest.raises(SafetensorError):
            way.load(tmp_path)
        way.assert_unchanged()


# -- configs ----------------------------------------------------------------------------------------------------------


def with_config(tuner: str, folder: Path, **settings: Any) -> Path:
    damaged(tuner, lambda values: values, folder)
    config = json.loads((folder / CONFIG).read_text())
    assert settings.keys() <= config.keys()
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    return folder


SIZES = {
    "learner": [{"r": 3_000_000}, {"rank_pattern": {"output.dense": 1025}}],
    "nas-unstructured": [{"r": 10**7}],
    "bottleneck-sequential": [{"bottleneck_dim": 10**9}],
}


@pytest.mark.parametrize(("tuner", "settings"), [(tuner, each) for tuner, all_ in SIZES.items() for each in all_])
def test_absurd_size(tuner, settings, tmp_path: Path):
    """A rank that no layer needs is refused before anything is allocated, with field, value, layer and bound."""
    if tuner.startswith("nas"):
        settings = {**settings, "architecture": None, "pruned_rounds": 0}
    (field, *_), base = settings, base_and_inputs(tuner)[0]
    names = set(base.state_dict())
    with pytest.raises(ValueError, match=rf"`{field}` must be at most 1024 on bert\..*, which has .*, got \d+"):
        PeftModel.from_pretrained(base, with_config(tuner, tmp_path, **settings))
    assert set(base.state_dict()) == names


def test_largest_size():
    """A layer of more features takes a rank up to their number."""
    model = torch.nn.Sequential(torch.nn.Linear(1100, 4), torch.nn.Linear(4, 4))
    settings = {"target_modules": ["0"], "priming_epochs": 0, "train_biases": False}
    get_peft_model(copy.deepcopy(model), methods()["learner"](r=1100, **settings))
    with pytest.raises(ValueError, match=r"`r` must be at most 1100 on 0, which has 1100 inputs and 4 outputs.*1101"):
        get_peft_model(model, methods()["learner"](r=1101, **settings))


REGEX_FIELDS = {
    "learner": ["target_modules", "exclude_modules", "priming_modules"],
    "far": ["target_modules", "exclude_modules"],
    "nas_lora": ["target_modules", "exclude_modules", "bias_modules"],
    "bottleneck": ["target_modules", "exclude_modules"],
}


@pytest.mark.parametrize(("method", "field"), [(m, f) for m, names in REGEX_FIELDS.items() for f in names])
def test_endless_regex(method, field):
    """A regex that takes a time without bound is refused."""
    for regex in ("(a+)+$", "(.*.*)*x", "("):
        with pytest.raises(ValueError, match=rf"`{field}` must hold regexes that match in a bounded time, got "):
            methods()[method](**{field: regex})
    methods()[method](**{field: r".*layers\.(1[0-9]|2[0-9])\..*proj"})


def test_endless_regex_in_names():
    """So are names that PEFT reads as regexes."""
    for settings in (
        {"rank_pattern": {"(a+)+$": 4}},
        {"modules_to_save": ["(a+)+$"]},
        {"layers_pattern": ["(a+)+$"], "layers_to_transform": [0]},
    ):
        with pytest.raises(ValueError, match="must hold regexes that match in a bounded time"):
            methods()["learner"](**settings)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("learner", "scaling"),
        ("learner", "priming_lr_scale"),
        ("learner", "priming_epochs"),
        ("far", "priming_epochs"),
        ("nas_lora", "search_epochs"),
        ("bottleneck", "scaling"),
    ],
)
@pytest.mark.parametrize("value", [1e300, -1e300, 10**400, float("inf"), float("nan")])
def test_numbers_without_limit(method, field, value):
    """Numbers have a limit, and the error says which."""
    with pytest.raises(ValueError, match=rf"`{field}` must be .*1,000,000.*, got "):
        methods()[method](**{field: value})


@pytest.mark.parametrize("value", [10**9, 2, -1])
def test_pruned_rounds(value, tmp_path: Path):
    """Rounds that are over can't be more than there are."""
    with pytest.raises(ValueError, match=rf"`pruned_rounds` must be .*, got {value}"):
        PeftConfig.from_pretrained(with_config("nas-structured", tmp_path, pruned_rounds=value))


def test_pruned_rounds_of_file(tmp_path: Path):
    """A config that holds an architecture can't say that nothing was pruned; without both, the file tells."""
    with pytest.raises(ValueError, match="`pruned_rounds` must be 0 without an `architecture`.*got 0 with one"):
        PeftConfig.from_pretrained(with_config("nas-structured", tmp_path, pruned_rounds=0))
    run = trained_once("nas-structured", ARCH)
    folder = with_config("nas-structured", tmp_path, pruned_rounds=0, architecture=None)
    model = PeftModel.from_pretrained(copy.deepcopy(run.base), folder)
    assert torch.equal(logits_of(model, run.inputs), run.logits)
    assert model.peft_config["default"].pruned_rounds == 1


@pytest.mark.parametrize("method", sorted(methods()))
def test_phases_of_the_method(method):
    """Recorded phases are those of the method."""
    for settings in ({"completed_phases": ["bogus"]}, {"phase_first_steps": {"bogus": 0}}):
        with pytest.raises(ValueError, match=rf"`{next(iter(settings))}` must name phases of .*, got .*bogus"):
            methods()[method](**settings)


JSON_VALUES: list[Any] = [
    None, True, 0, -1, 5, 2**70, 0.5, -0.5, 1e300, "", "x", "yes", [], [1], ["x"], [""], [None], [["x"]], [[]], {},
    {"x": 1}, {"x": "y"}, {"x": None}, {"x": {"y": [1, 2]}}, {"": 0}, [{"x": 1}], {"x": [[1]]},
]  # fmt: skip


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's declared type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Union:
        return any(fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, set):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


@pytest.mark.parametrize("method", sorted(methods()))
def test_types_of_fields(method):
    """Each field, given a value of another type than it declares, says its name, what it got and what would be right;
    given one of its type, it takes it or says so too."""
    config = methods()[method]
    hints = typing.get_type_hints(config)
    tried = 0
    for field in fields(config):
        if not field.init or field.name in ("peft_type", "task_type"):  # PEFT's own: the class decides, it checks
            continue
        for value in JSON_VALUES:
            try:
                config(**{field.name: copy.deepcopy(value)})
            except ValueError as error:
                words = str(error)
                assert f"`{field.name}`" in words or f"{field.name}=" in words, (field.name, value, words)
                continue
            assert fits(value, hints[field.name]), (field.name, value)
            tried += 1
    assert tried > 20
