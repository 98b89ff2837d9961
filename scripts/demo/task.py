"""A small acceptability task, written by a grammar: is this sentence good English?

    python -m scripts.demo.task --split dev

Sentences come in pairs, one good (label 1) and one bad (label 0), made of *the same words* in another order. No count
of words can tell them apart, only the structure can. Training and development sentences share function words and
constructions, but no noun, verb or adjective. Pure Python; the same seed gives the same sentences everywhere.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

LABELS = ("unacceptable", "acceptable")


@dataclass(frozen=True)
class Sentence:
    """One sentence of the task.

    Attributes:
        text: the sentence.
        label: 1 if it is acceptable, else 0.
        construction: name of the rule that wrote it.
        pair: number of its pair within the split.
    """

    text: str
    label: int
    construction: str
    pair: int


@dataclass(frozen=True)
class Lexicon:
    """Content words. Nouns are regular (plural in -s); verbs are regular, given as their past form in -ed."""

    people: tuple[str, ...]
    animals: tuple[str, ...]
    things: tuple[str, ...]
    person_adjectives: tuple[str, ...]
    thing_adjectives: tuple[str, ...]
    person_verbs: tuple[str, ...]
    animal_verbs: tuple[str, ...]
    thing_verbs: tuple[str, ...]
    manners: tuple[str, ...]

    def words(self) -> set[str]:
        """Every form that the grammar can write."""
        nouns = (*self.people, *self.animals, *self.things)
        verbs = (*self.person_verbs, *self.animal_verbs, *self.thing_verbs)
        forms = {*nouns, *map(plural, nouns), *verbs, *map(progressive, verbs)}
        return forms | {*self.person_adjectives, *self.thing_adjectives, *self.manners}


TRAIN = Lexicon(
    people=(
        *("actor", "baker", "banker", "butcher", "captain", "carpenter", "dancer", "doctor", "driver", "farmer"),
        *("gardener", "guard", "hunter", "judge", "king", "lawyer", "manager", "miner", "painter", "pilot"),
        *("poet", "priest", "queen", "sailor", "singer", "soldier", "student", "tailor", "teacher", "writer"),
    ),
    animals=(
        *("bear", "bird", "bull", "cat", "camel", "cow", "dog", "duck", "eagle", "elephant"),
        *("frog", "goat", "hawk", "horse", "kitten", "lion", "monkey", "parrot", "pig", "rabbit"),
    ),
    things=(
        *("apple", "basket", "blanket", "book", "boot", "bottle", "bowl", "bucket", "button", "cabinet"),
        *("candle", "carpet", "chair", "clock", "coat", "cup", "curtain", "door", "drum", "gate"),
        *("guitar", "hammer", "jacket", "kettle", "key", "ladder", "lamp", "letter", "mirror", "painting"),
    ),
    person_adjectives=("angry", "busy", "calm", "clever", "famous", "friendly", "happy", "lazy", "polite", "tired"),
    thing_adjectives=("broken", "cheap", "clean", "dusty", "heavy", "new", "old", "red", "small", "wet"),
    person_verbs=("admired", "annoyed", "avoided", "called", "followed", "helped", "ignored", "insulted", "praised"),
    animal_verbs=("amused", "bathed", "calmed", "cooled", "defended", "injured", "scratched", "warmed"),
    thing_verbs=("cleaned", "collected", "counted", "covered", "lifted", "painted", "pulled", "repaired", "washed"),
    manners=("certainly", "clearly", "finally", "often", "probably", "rarely"),
)
DEV = Lexicon(
    people=(
        *("barber", "boxer", "chef", "clerk", "cook", "engineer", "janitor", "nurse", "officer", "plumber"),
        *("professor", "reporter", "scientist", "senator", "surgeon", "tutor", "waiter", "wizard", "worker"),
    ),
    animals=("badger", "chicken", "crow", "dolphin", "hen", "owl", "snake", "tiger", "turtle", "whale"),
    things=(
        *("bag", "barrel", "bell", "cart", "cushion", "desk", "fork", "hat", "jar", "needle"),
        *("pencil", "pillow", "plate", "ring", "rope", "shirt", "spoon", "table", "towel", "wallet"),
    ),
    person_adjectives=("bored", "brave", "gentle", "hungry", "nervous", "proud", "quiet", "rude"),
    thing_adjectives=("blue", "cold", "dirty", "empty", "expensive", "large", "light", "yellow"),
    person_verbs=("attacked", "greeted", "interviewed", "invited", "remembered", "trusted", "visited"),
    animal_verbs=("cured", "comforted", "exhausted", "licked", "protected", "rescued"),
    thing_verbs=("borrowed", "delivered", "dropped", "loaded", "opened", "packed", "rolled"),
    manners=("already", "obviously", "recently", "sometimes", "usually"),
)
PREPOSITIONS = ("near", "behind", "beside", "under", "above", "opposite")


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    return noun + "s"


def progressive(verb: str) -> str:
    """The form in -ing of a regular verb, from its form in -ed."""
    return verb.removesuffix("ed") + "ing"


def _opposite_numbers(rng: random.Random, nouns: tuple[str, ...]) -> tuple[str, str, bool]:
    """Two different nouns, one of them plural, and whether it is the first."""
    first, second = rng.sample(nouns, 2)
    first_is_plural = rng.random() < 0.5
    return (plural(first), second, True) if first_is_plural else (first, plural(second), False)


def _be(rng: random.Random, is_plural: bool) -> str:
    return rng.choice((("is", "are"), ("was", "were")))[is_plural]


def agreement(rng: random.Random, words: Lexicon) -> tuple[str, str]:
    """The verb agrees with the first noun, not with the nearer one."""
    a, b, is_plural = _opposite_numbers(rng, words.things)
    rest = f"{_be(rng, is_plural)} {rng.choice(words.thing_adjectives)}"
    preposition = rng.choice(PREPOSITIONS)
    return f"the {a} {preposition} the {b} {rest}", f"the {b} {preposition} the {a} {rest}"


def relative(rng: random.Random, words: Lexicon) -> tuple[str, str]:
    """The same, with a relative clause between noun and verb."""
    a, b, is_plural = _opposite_numbers(rng, words.people)
    verb, be, adjective = rng.choice(words.person_verbs), _be(rng, is_plural), rng.choice(words.person_adjectives)
    return f"the {a} that the {b} {verb} {be} {adjective}", f"the {b} that the {a} {verb} {be} {adjective}"


def reflexive(rng: random.Random, words: Lexicon) -> tuple[str, str]:
    """The reflexive agrees with the first noun."""
    a, b, is_plural = _opposite_numbers(rng, words.animals)
    preposition = rng.choice(PREPOSITIONS)
    rest = f"{rng.choice(words.animal_verbs)} {'themselves' if is_plural else 'itself'}"
    return f"the {a} {preposition} the {b} {rest}", f"the {b} {preposition} the {a} {rest}"


def auxiliary(rng: random.Random, words: Lexicon) -> tuple[str, str]:
    """ "have" goes with the participle in -ed, "be" with the one in -ing."""
    person, (verb, other), (a, b) = (
        rng.choice(words.people),
        rng.sample(words.thing_verbs, 2),
        rng.sample(words.things, 2),
    )
    is_plural = rng.random() < 0.5
    have, be = ("have", "are") if is_plural else ("has", "is")
    subject = f"the {plural(person) if is_plural else person}"
    first, second = f"{verb} the {a}", f"{progressive(other)} the {b}"
    if rng.random() < 0.5:
        first, second, have, be = second, first, be, have
    return f"{subject} {have} {first} and {be} {second}", f"{subject} {be} {first} and {have} {second}"


def determiner(rng: random.Random, words: Lexicon) -> tuple[str, str]:
    """Demonstratives agree with their noun."""
    a, b, is_plural = _opposite_numbers(rng, words.things)
    these = rng.choice((("this", "those"), ("that", "these"), ("this", "these"), ("that", "those")))
    first, second = these[is_plural], these[not is_plural]
    subject, verb = rng.choice(words.people), rng.choice(words.thing_verbs)
    return f"the {subject} {verb} {first} {a} and {second} {b}", f"the {subject} {verb} {first} {b} and {second} {a}"


def order(rng: random.Random, words: Lexicon) -> tuple[str, str]:
    """Adjectives come before their noun, adverbs of manner before the verb."""
    person, thing = rng.choice(words.people), rng.choice(words.things)
    if rng.random() < 0.5:
        person, thing = plural(person), plural(thing)
    one, two = rng.choice(words.person_adjectives), rng.choice(words.thing_adjectives)
    verb, manner = rng.choice(words.thing_verbs), rng.choice(words.manners)
    good = f"the {one} {person} {manner} {verb} the {two} {thing}"
    bad = rng.choice(
        (
            f"the {person} {one} {manner} {verb} the {two} {thing}",
            f"the {one} {person} {manner} {verb} the {thing} {two}",
            f"the {one} {person} {verb} {manner} the {two} {thing}",
        )
    )
    return good, bad


CONSTRUCTIONS: tuple[Callable[[random.Random, Lexicon], tuple[str, str]], ...] = (
    agreement,
    relative,
    reflexive,
    auxiliary,
    determiner,
    order,
)
#: Lexicon and usual number of pairs by split.
SPLITS = {"train": (TRAIN, 1200), "dev": (DEV, 252)}


def write(lexicon: Lexicon, pairs: int, seed: int | str) -> list[Sentence]:
    """Write pairs of sentences, as many of each construction, none twice, in random order."""
    rng = random.Random(seed)
    seen: set[str] = set()
    sentences: list[Sentence] = []
    for pair in range(pairs):
        construction = CONSTRUCTIONS[pair % len(CONSTRUCTIONS)]
        texts = construction(rng, lexicon)
        while not seen.isdisjoint(texts):
            texts = construction(rng, lexicon)
        seen.update(texts)
        for label, text in zip((1, 0), texts, strict=True):
            sentences.append(Sentence(f"{text.capitalize()}.", label, construction.__name__, pair))
    rng.shuffle(sentences)
    return sentences


def load(split: str, pairs: int | None = None, seed: int = 0) -> list[Sentence]:
    """The sentences of a split: "train" or "dev"; `pairs` is how many pairs, in place of the usual number."""
    lexicon, usual = SPLITS[split]
    return write(lexicon, usual if pairs is None else pairs, f"{split} {seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the sentences of a split, tab-separated.")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--pairs", type=int, help="how many pairs of sentences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for sentence in load(args.split, args.pairs, args.seed):
        print(sentence.label, sentence.construction, sentence.text, sep="\t")


if __name__ == "__main__":
    main()
