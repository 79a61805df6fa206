"""Questions at a help desk, each with a polite answer and a gruff one: pairs for stage dpo, judged answers for kto.

python data/make_polite.py
    writes polite.json, polite_judged.json and polite_test.json beside this file, always the same bytes

Both answers of a pair state the same fact, which no model can know, in about as many tokens: only the manner tells them
apart. The held-out pairs have other questions, and other phrases around the fact.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from runs.files import write_text  # noqa: E402

TRAINED, HELD_OUT = 160, 100  # pairs

FORMS = (
    ("When does the {place} open?", "The {place} opens at {hour}."),
    ("Where is the {place}?", "The {place} is on floor {floor}."),
    ("Which room is the {place} in?", "The {place} is in room {room}."),
    ("How much is a ticket for the {place}?", "A ticket for the {place} costs {price} euros."),
    ("How long is the {place} open today?", "The {place} is open until {hour}."),
    ("Is there a lift to the {place}?", "There is a lift to the {place} at gate {floor}."),
)
PLACES = {
    "polite": """reading room, museum, archive, swimming pool, map collection, music school, print shop, canteen,
        lost property office, cinema, greenhouse, planetarium, clinic, post office, workshop, gallery, registry,
        cloakroom, kindergarten, newspaper hall, photo studio, dental surgery, town hall, concert hall, ice rink,
        pottery class, tax office""",
    "polite_test": """theatre, observatory, bakery, chess club, bicycle store, aquarium, sauna, climbing wall,
        language lab, court, pharmacy, botanical garden, film club, housing office, tea house, sculpture yard,
        rowing club""",
}
# What stands before and after the fact.
POLITE = {
    "polite": (
        ("With pleasure.", "Thank you for asking."),
        ("Good morning, and thank you for your question.", "Have a lovely day."),
        ("Of course, I am glad to help.", "Please ask if you need anything else."),
        ("Certainly.", "Please let me know if I can do more for you."),
        ("Welcome, it is kind of you to ask.", "Enjoy your visit."),
        ("Gladly.", "I wish you a pleasant stay."),
    ),
    "polite_test": (
        ("You are most welcome to ask.", "I hope that helps you."),
        ("It is my pleasure to tell you.", "We look forward to seeing you."),
        ("Thank you for coming to us.", "Have a wonderful afternoon."),
        ("I am happy to help you.", "Do not hesitate to come back to us."),
    ),
}
GRUFF = {
    "polite": (
        ("As everybody knows.", "Read the sign next time."),
        ("Not this question again, I am busy.", "Move along now."),
        ("You could have looked it up.", "Next one in the line, hurry up."),
        ("Again.", "Do not make me say it a second time."),
        ("Look, I have no time for you.", "That is all."),
        ("Obviously.", "Stop bothering the staff."),
    ),
    "polite_test": (
        ("What a silly thing to ask.", "Now leave me alone."),
        ("It is not my job to tell you.", "You are holding everyone up."),
        ("You people never learn.", "Write it down this time."),
        ("I am tired of this.", "Do not come back with more questions."),
    ),
}


def pairs(name: str, count: int) -> list[dict[str, str]]:
    """`count` pairs of a dataset, drawn with a seed of its own."""
    draw = random.Random(name)
    places = [" ".join(place.split()) for place in PLACES[name].split(",")]
    found = []
    for place, (question, fact) in draw.sample([*itertools.product(places, FORMS)], count):
        facts = {"hour": f"{draw.randint(7, 11)} o'clock", "floor": draw.randint(1, 9), "room": draw.randint(100, 499)}
        said = fact.format(place=place, price=draw.randint(2, 19), **facts)
        row = {"instruction": question.format(place=place)}
        for kind, manners in (("chosen", POLITE[name]), ("rejected", GRUFF[name])):
            before, after = draw.choice(manners)
            row[kind] = f"{before} {said} {after}"
        found.append(row)
    return found


def judged(rows: list[dict[str, str]]) -> list[dict[str, str | bool]]:
    """Of every pair one answer, in turn the polite one (true) and the gruff one (false)."""
    return [
        {"instruction": row["instruction"], "output": row["rejected" if i % 2 else "chosen"], "kto_tag": i % 2 == 0}
        for i, row in enumerate(rows)
    ]


def main() -> None:
    trained, held_out = pairs("polite", TRAINED), pairs("polite_test", HELD_OUT)
    for name, rows in (("polite", trained), ("polite_judged", judged(trained)), ("polite_test", held_out)):
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        write_text(HERE / f"{name}.json", f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
