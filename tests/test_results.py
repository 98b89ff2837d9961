"""The numbers in README and in the tuners' pages are those of the committed results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"mrpc": ("eval_accuracy", "eval_f1"), "cola": ("eval_matthews_correlation",),
           "stsb": ("eval_pearson", "eval_spearmanr")}  # fmt: skip

PLAIN_FAR = {"retention_ratio": 0.1, "priming_ratio": 0.01, "selection": "l1", "granularity": "hidden_unit",
             "discard_unkept": False, "train_embeddings": True}  # fmt: skip
VARIANTS = {"": {}, "random nodes": {"selection": "random"}, "unkept discarded": {"discard_unkept": True},
            "output nodes": {"granularity": "output_node"}}  # fmt: skip
NAS = {
    "U-BitFit, 10 %": {"r": 0, "parameter_budget": 0.1, "nas_granularity": "unstructured", "rounds": 1},
    "U-BitFit, 10 %, two rounds": {"r": 0, "parameter_budget": 0.1, "nas_granularity": "unstructured", "rounds": 2},
    "U-BitFit, 50 %": {"r": 0, "parameter_budget": 0.5, "nas_granularity": "unstructured", "rounds": 1},
    "U-MaM, 321,024": {"r": 16, "parameter_budget": 321_024.0, "nas_granularity": "unstructured", "rounds": 1},
    "S-MaM, 321,024": {"r": 16, "parameter_budget": 321_024.0, "nas_granularity": "structured", "rounds": 1},
}  # fmt: skip
PAGES = ("learner.md", "far.md", "nas_lora.md")
BENCH = {"in priming": "far_priming", "after, by hidden unit": "far_after",
         "the same, `discard_unkept`": "far_after_discard",
         "after, by output node": "far_after_output_node"}  # fmt: skip


NAS_BENCH = {
    "search of U-MaM, against the same adapter without importance": ("search_u_mam", "search"),
    "search of S-MaM, against the same": ("search_s_mam", "search"),
    "search of U-BitFit, against the same": ("search_u_bitfit", "search"),
    "retraining 10 % of the biases, against BitFit": ("retraining_bitfit", "u_bitfit_10"),
    "retraining 1 % of the biases, against BitFit": ("retraining_bitfit", "u_bitfit_1"),
    "retraining S-MaM at half, against LoRA of rank 8 with biases": ("retraining_lora", "s_mam_half"),
    "retraining U-MaM at half, against LoRA of rank 8 with biases": ("retraining_lora", "u_mam_half"),
}


def rows() -> list[tuple[str, str, str, str]]:
    """`(task, method, values, file)` of the table in README."""
    table = re.findall(r"^\| (\w+) \| (\w+(?: \([^)]*\))?) \| ([\d. /]+) \| \[.*?\]\((results/glue/.*?\.json)\) \|$",
                       (ROOT / "README.md").read_text(), re.M)  # fmt: skip
    assert table
    return table


@pytest.mark.parametrize("task,method,values,file", rows(), ids=lambda value: str(value)[-40:])
def test_readme_and_results_agree(task, method, values, file):
    result = json.loads((ROOT / file).read_text())
    name, _, variant = method.partition(" (")
    assert result["finished"] and (result["task"], result["method"]) == (task.lower(), name)
    if name == "far":
        told = VARIANTS[variant.rstrip(")")]
        assert {key: result["config"][key] for key in PLAIN_FAR} == {**PLAIN_FAR, **told}
    if name == "nas_lora":
        told = NAS[variant.rstrip(")")]
        assert {key: result["config"][key] for key in told} == told
    assert values == " / ".join(f"{100 * result['final'][metric]:.1f}" for metric in METRICS[result["task"]])


def test_every_results_file_is_in_the_readme():
    assert {row[3] for row in rows()} == {str(p.relative_to(ROOT)) for p in (ROOT / "results/glue").glob("*.json")}


def test_results_hold_no_path_of_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"/(?!\s)', path.read_text()), path


@pytest.mark.parametrize("label,variant", BENCH.items())
def test_the_benchmark_table_is_that_of_its_files(label, variant):
    off, on = (
        json.loads((ROOT / f"results/bench/far-minilm-16x128-cpu{name}.json").read_text())["variants"][variant]
        for name in ("-no-dropout", "")
    )
    file = off.get("adapter_file_bytes")
    cells = [
        f"{off['time_ratios']['step']['median']:.2f}", f"{off['bytes_ratios']['stored']:.2f}",
        f"{on['bytes_ratios']['stored']:.2f}", f"{off['bytes_ratios']['total']:.2f}",
        f"{file / 1e6:.1f} MB" if file else "",
    ]  # fmt: skip
    assert f"| {label} | {' | '.join(cells)} |" in (ROOT / "docs/far.md").read_text()


@pytest.mark.parametrize("label,place", NAS_BENCH.items())
def test_the_benchmark_table_of_nas_lora_is_that_of_its_files(label, place):
    comparison, variant = place
    long, short = (
        json.loads((ROOT / f"results/bench/nas-minilm-16x{tokens}-cpu-no-dropout.json").read_text())["comparisons"][
            comparison
        ]["variants"][variant]
        for tokens in (128, 32)
    )
    times = [found["time_ratios"]["step"] for found in (long, short)]
    file = long.get("adapter_file_bytes")
    cells = [
        *(f"{time['median']:.2f} [{time['q1']:.2f}, {time['q3']:.2f}]" for time in times),
        f"{long['bytes_ratios']['optimizer']:.2f}", f"{file / 1e6:.2f} MB" if file else "",
    ]  # fmt: skip
    assert f"| {label} | {' | '.join(cells)} |" in (ROOT / "docs/nas_lora.md").read_text()


def test_kept_shares_are_those_of_their_files():
    for init in ("kaiming", "lora"):
        record = json.loads((ROOT / f"results/architectures/shares-{init}.json").read_text())
        for row in record["rows"]:
            cells = [f"{100 * row['kept'][part]['share']:.1f}" for part in ("U", "V", "bias")]
            line = f"| {init} | {100 * row['budget']:.0f} % | {' | '.join(cells)} |"
            assert line in (ROOT / "docs/nas_lora.md").read_text(), line


def cost_rows() -> list[tuple[str, str, str, str]]:
    """`(trained in the first phase, in the last, size of the file, path)` of the cost tables in the tuners' pages."""
    form = r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) MB \| \[json\]\(\.\./(results/glue/[\w-]+\.json)\) \|$"
    pages = {page: re.findall(form, (ROOT / "docs" / page).read_text(), re.M) for page in PAGES}
    assert all(pages.values())
    return [row for found in pages.values() for row in found]


@pytest.mark.parametrize("first,last,size,file", cost_rows())
def test_costs_in_the_pages_are_those_of_the_runs(first, last, size, file):
    result = json.loads((ROOT / file).read_text())
    trained = result["parameters"]
    assert (first, last) == (f"{trained['trained_first_phase']:,}", f"{trained['trained_last_phase']:,}")
    digits = len(size.partition(".")[2])
    assert size == f"{result['adapter_bytes'] / 1e6:.{digits}f}"


@pytest.mark.parametrize("file", ["mrpc-learner-r64-minilm", "mrpc-far10-minilm"])
def test_what_exports_cost_is_what_their_files_say(file):
    record, page = (
        json.loads((ROOT / f"results/export/{file}.json").read_text()),
        (ROOT / "docs/export.md").read_text(),
    )
    table = page.partition(f"(../results/export/{file}.json)")[2].partition("\n\nAnd FAR")[0]

    def scores(dev: dict[str, float]) -> str:
        return f"{100 * dev['accuracy']:.1f} / {100 * dev['f1']:.1f}"

    for row in record["exports"]:
        errors = f"{row['median_error']:.2f} | {row['largest_error']:.2f}"
        line = f"| {row['rank']} | {errors} | {row['bytes'] / 1e6:.1f} MB | {scores(row['dev'])} |"
        assert f"{line} {row['changed_predictions']} |" in table
    assert f"{scores(record['adapter']['dev'])} by itself" in page
    assert f"{record['adapter']['bytes'] / 1e6:.1f} MB" in page
    assert record["rows"] == 408


LEARNER_BENCH = {
    "learner_priming": "in priming", "learner_primed": "after priming", "learner_unprimed": "without priming",
    "learner_unprimed_no_norms": "the same, `train_norms=False`", "full": "full fine-tuning",
}  # fmt: skip
SHAPES = ((8, 32), (8, 128), (64, 32), (64, 128))


def learner_bench(rank: int, tokens: int) -> dict:
    file = ROOT / f"results/bench/learner-r{rank}-minilm-16x{tokens}-cpu-no-dropout.json"
    found = json.loads(file.read_text())
    assert (found["settings"]["rank"], found["settings"]["tokens"]) == (rank, tokens)
    return found["variants"]


def test_the_benchmark_tables_of_learners_are_those_of_their_files():
    page, benches = (ROOT / "docs/learner.md").read_text(), [learner_bench(*shape) for shape in SHAPES]
    for name, label in LEARNER_BENCH.items():
        times = [bench[name]["time_ratios"]["step"] for bench in benches]
        cells = [f"{time['median']:.2f} [{time['q1']:.2f}, {time['q3']:.2f}]" for time in times]
        cells += [f"{benches[-1][name]['bytes_ratios'][kind]:.2f}" for kind in ("stored", "total")]
        assert f"| {label} | {' | '.join(cells)} |" in page
    for name, label in (("lora", "LoRA"), ("learner_unprimed", "Learner")):
        cells = [f"{bench[name]['flops_to_bound']:.2f}" for bench in benches]
        assert f"| {label} | {' | '.join(cells)} |" in page
