"""A small task for a language model, written by rules: an order as a record, and the sentence that tells it.

    python -m scripts.evidence.sentences

The prompt gives five fields in any order. The completion names the day two days later, the number in words and the
plural: copying, spelling and counting, in a form that is always the same. Pure Python; the same seed gives the same
rows everywhere.
"""

from __future__ import annotations

import random

NAMES = (
    *("Ada", "Bo", "Cleo", "Dora", "Emil", "Finn", "Greta", "Hugo", "Ida", "Jon", "Kira", "Leo", "Mona", "Nils"),
    *("Olga", "Per", "Rosa", "Sven", "Tara", "Uwe", "Vera", "Wim"),
)
#: Goods with their plurals.
GOODS = {
    **{word: f"{word}s" for word in ("hammer", "lamp", "chair", "bottle", "spoon", "candle", "rope", "drum")},
    **{"brush": "brushes", "box": "boxes", "knife": "knives", "shelf": "shelves", "berry": "berries"},
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")

Row = dict[str, str]


def row(chance: random.Random) -> Row:
    """One prompt and its completion."""
    sender, receiver = chance.sample(NAMES, 2)
    good, day, count = chance.choice([*GOODS]), chance.randrange(7), chance.randint(2, 9)
    fields = [("from", sender), ("to", receiver), ("good", good), ("day", DAYS[day][:3]), ("n", count)]
    chance.shuffle(fields)
    later = DAYS[(day + 2) % 7]
    return {
        "prompt": " ".join(f"{name}={value}" for name, value in fields) + "\n",
        "completion": f"On {later} {receiver} gets {NUMBERS[count - 2]} {GOODS[good]} from {sender}.",
    }


def rows(count: int, seed: int, but: list[Row] | None = None) -> list[Row]:
    """Rows that differ from each other and from those in `but`."""
    chance = random.Random(seed)
    seen, found = {each["completion"] for each in but or ()}, []
    while len(found) < count:
        made = row(chance)
        if made["completion"] not in seen:
            seen.add(made["completion"])
            found.append(made)
    return found


if __name__ == "__main__":
    for each in rows(8, seed=0):
        print(each["prompt"] + each["completion"], end="\n\n")
