"""The generated task of the demo: deterministic, balanced, without overlap, and out of reach of counting words."""

import hashlib
from collections import Counter

import pytest

from scripts.demo import task as demo_task


@pytest.fixture(scope="module")
def train() -> list[demo_task.Sentence]:
    return demo_task.load("train")


@pytest.fixture(scope="module")
def dev() -> list[demo_task.Sentence]:
    return demo_task.load("dev")


def words(sentence: demo_task.Sentence) -> list[str]:
    return sentence.text.lower().rstrip(".").split()


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "728188ebd85a40187cac1e21a06ff32ad10af181007d2c23629c84390a969800"),
        ("dev", "c8a7dddf3e8b8d3f0796601f26ce4235450b30b684df1744708b99b830957029"),
    ],
)
def test_same_sentences_everywhere(split, digest):
    # sha256 of what `python -m scripts.demo.task --split ...` prints; the same on Python 3.10 to 3.13
    text = "".join(f"{s.label}\t{s.construction}\t{s.text}\n" for s in demo_task.load(split))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_same_seed_same_sentences(train):
    assert demo_task.load("train", seed=0) == train
    assert [s.text for s in demo_task.load("train", seed=1)] != [s.text for s in train]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_balanced(split):
    sentences = demo_task.load(split)
    assert len(sentences) == 2 * demo_task.SPLITS[split][1]
    counts = Counter((s.construction, s.label) for s in sentences)
    assert len(counts) == 2 * len(demo_task.CONSTRUCTIONS)
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("split", ["train", "dev"])
def test_pairs(split):
    """A pair is two orders of the same words."""
    pairs: dict[int, list[demo_task.Sentence]] = {}
    for sentence in demo_task.load(split):
        pairs.setdefault(sentence.pair, []).append(sentence)
    for pair in pairs.values():
        bad, good = sorted(pair, key=lambda s: s.label)
        assert (bad.label, good.label) == (0, 1)
        assert bad.text != good.text
        assert Counter(words(bad)) == Counter(words(good))


def test_no_sentence_twice(train, dev):
    texts = [s.text for s in (*train, *dev)]
    assert len(set(texts)) == len(texts)


def test_splits_share_no_content_word(train, dev):
    assert demo_task.TRAIN.words().isdisjoint(demo_task.DEV.words())
    used = {split: {w for s in sentences for w in words(s)} for split, sentences in (("train", train), ("dev", dev))}
    assert used["train"].isdisjoint(demo_task.DEV.words())
    assert used["dev"].isdisjoint(demo_task.TRAIN.words())
    # what they share are words of the constructions, which training has all seen
    assert used["dev"] - demo_task.DEV.words() <= used["train"]


@pytest.mark.parametrize("pairs", [0, 1, 7])
def test_number_of_pairs(pairs):
    assert len(demo_task.load("dev", pairs)) == 2 * pairs


def test_counts_of_words_say_nothing(train, dev):
    pytest.importorskip("sklearn", reason="needs the extra 'scripts'")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([s.text for s in train], [s.label for s in train])
    accuracy = model.score([s.text for s in dev], [s.label for s in dev])
    assert accuracy == 0.5  # the two of a pair get the same answer
