"""A data set out of a grammar: commands to a home assistant, for demonstrations and tests without files."""

import json
import random
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Literal

from phi3_jax.data.rows import Place, Row
from phi3_jax.errors import UserError

Split = Literal["train", "validation", "test"]
TaskName = Literal["sequence-classification", "token-classification", "causal-lm"]
Parts = list[tuple[str | None, str]]
"""Stretches of words, each with its slot."""

COUNTS: dict[Split, int] = {"train": 2000, "validation": 250, "test": 250}
"""Rows of a split where no other count is asked for."""

# A sentence belongs to the split that its hash falls to: none is in two, whatever the seed.
_SHARES: tuple[Split, ...] = ("train", "train", "train", "train", "train", "train", "validation", "test")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_SLOTS = {
    "time": _listed(
        "noon, midnight, seven, half past six, a quarter to nine, ten in the evening, eight thirty, five "
        "in the morning, twenty past four, three o'clock"
    ),
    "date": _listed(
        "today, tomorrow, on monday, on friday, next sunday, this weekend, in two days, the day after "
        "tomorrow, on the first of may, next week"
    ),
    "length": _listed(
        "ten minutes, one hour, ninety seconds, a quarter of an hour, three minutes, two and a half "
        "hours, forty five minutes, half a minute"
    ),
    "room": _listed(
        "kitchen, bedroom, living room, cellar, hall, guest room, bathroom, attic, garage, dining room"
    ),
    "device": _listed(
        "heater, fan, coffee machine, washing machine, television, air conditioner, oven, robot vacuum, "
        "kettle, dish washer"
    ),
    "color": _listed("red, warm white, deep blue, green, soft orange, purple, cold white"),
    "number": _listed("two, five, nineteen, twenty one, thirty, eighty, sixty five, twelve"),
    "song": _listed(
        "paper boats, the long way round, winter garden, stay a while, blue horizon, one more train, "
        "river of glass, hello my sun, nine lanterns, slow rain"
    ),
    "artist": _listed(
        "anna bell, the night owls, marco silva, green harbor, lena fox, the tin soldiers, oscar lane, "
        "silver fern, dj comet, rosa and the wolves"
    ),
    "city": _listed(
        "paris, new york, lisbon, cape town, oslo, san diego, tokyo, rio de janeiro, vienna, nairobi, "
        "hong kong, quebec"
    ),
    "item": _listed(
        "milk, olive oil, brown bread, eggs, toilet paper, apples, coffee beans, washing powder, rice, "
        "dark chocolate"
    ),
    "person": _listed(
        "mom, doctor miller, tom, aunt clara, my boss, sara lopez, the neighbors, grandpa, ben, mister chen"
    ),
    "message": _listed(
        "i am late, dinner is ready, call me back, happy birthday, see you soon, the train is full, bring "
        "the keys, we won the game"
    ),
}

_INTENTS = {
    "set_alarm": _listed(
        "wake me up at {time}, wake me {date} at {time}, set an alarm for {time} {date}, i have to be up "
        "at {time} {date}, ring the bell at {time}, alarm at {time} {date}"
    ),
    "cancel_alarm": _listed(
        "cancel the alarm at {time}, delete my {time} alarm {date}, no alarm {date}, i do not need to be "
        "woken at {time} {date}, forget the alarm for {time}, let me sleep {date}"
    ),
    "set_timer": _listed(
        "start a timer for {length}, tell me when {length} are over, count down {length}, timer for the "
        "{device} {length}, remind me of the {device} in {length}, give me {length}"
    ),
    "play_music": _listed(
        "play {song} by {artist}, put on {song}, i want to hear {artist}, play something by {artist}, "
        "play {song} in the {room}, music by {artist} in the {room}, start the song {song}"
    ),
    "turn_on_light": _listed(
        "turn on the light in the {room}, lights on in the {room}, make the {room} bright, it is too dark "
        "in the {room}, light up the {room} in {color}, switch the {room} lamp on"
    ),
    "turn_off_light": _listed(
        "turn off the light in the {room}, lights out in the {room}, make the {room} dark, it is too "
        "bright in the {room}, switch the {room} lamp off {date} at {time}"
    ),
    "set_color": _listed(
        "make the {room} light {color}, change the lamp in the {room} to {color}, i want {color} light, "
        "color the {room} {color}, {color} light for the {room}, paint the {room} in {color} light"
    ),
    "set_temperature": _listed(
        "set the {room} to {number} degrees, make it {number} degrees in the {room}, heat the {room} to "
        "{number} degrees at {time}, i want {number} degrees {date} in the {room}, cool the {room} down "
        "to {number}, {number} degrees for the {room}"
    ),
    "weather": _listed(
        "what is the weather like in {city}, will it rain in {city} {date}, how warm is it in {city}, do "
        "i need an umbrella {date}, weather for {city} {date}, is there snow in {city} {date}"
    ),
    "switch_device": _listed(
        "start the {device}, stop the {device} in the {room}, turn the {device} on at {time}, switch the "
        "{device} in the {room} off, let the {device} run for {length}, is the {device} on"
    ),
    "shopping_list": _listed(
        "add {item} to the shopping list, we are out of {item}, put {number} {item} on the list, i need "
        "{item} and {item}, buy {item} {date}, take {item} off the shopping list"
    ),
    "send_message": _listed(
        "tell {person} that {message}, write to {person} {message}, send {person} a message {message}, "
        "let {person} know {message}, text {person} {message}, message for {person} {message}"
    ),
    "travel_time": _listed(
        "how long does it take to {city}, when do i have to leave for {city} {date}, how far is {city} "
        "from {city}, take me to {city}, is there a train to {city} at {time}, i have to be in {city} "
        "{date} at {time}"
    ),
}

# The empty ones are drawn too: many commands come without politeness.
_BEFORE = _listed(",,, please, hey, hello house, okay, listen, excuse me, one more thing")
_BEHIND = _listed(",,,, please, thanks, thank you very much, my friend")
# Far more draws than it takes to find a sentence that is still free.
_PATIENCE = 2000


def generated_rows(split: Split, task: TaskName, count: int | None = None, *, seed: int = 0) -> Iterator[Row]:
    """Different sentences of the grammar, the same ones for the same arguments; fewer are the first of more.

    `sequence-classification` has `text` and `label`, the intent; `token-classification` has `words` and
    `labels`, BIO tags of the slots; `causal-lm` has `messages`, a command and a line of JSON in answer.

    Raises:
        ValueError: an unknown name; the grammar has fewer sentences than `count`.
    """
    for name, value, known in (("split", split, COUNTS), ("task", task, _VALUES)):
        if value not in known:
            raise UserError(f"{name}={value!r}; use one of {', '.join(map(repr, known))}")
    return _rows(split, task, COUNTS[split] if count is None else count, seed)


def _rows(split: Split, task: TaskName, count: int, seed: int) -> Iterator[Row]:
    generator = random.Random(f"{split} {seed}")
    said: set[str] = set()
    while len(said) < count:
        for _ in range(_PATIENCE):
            intent, parts = _sentence(generator)
            text = " ".join(words for _, words in parts)
            if text not in said and _split_of(text) == split:
                break
        else:
            raise UserError(
                f"count={count}: the grammar has little more than {len(said)} sentences; use fewer"
            )
        said.add(text)
        yield Row(_VALUES[task](intent, parts), Place(f"generated-{split}", len(said), "row"))


def _sentence(generator: random.Random) -> tuple[str, Parts]:
    intent = generator.choice(list(_INTENTS))
    pieces = generator.choice(_INTENTS[intent]).split()
    parts: Parts = []
    for piece in [generator.choice(_BEFORE), *pieces, generator.choice(_BEHIND)]:
        slot = piece[1:-1] if piece.startswith("{") else None
        if slot:
            # Nothing is asked for twice: no way leads from oslo to oslo.
            piece = generator.choice([words for words in _SLOTS[slot] if (slot, words) not in parts])
        if piece:
            parts.append((slot, piece))
    return intent, parts


def _split_of(text: str) -> Split:
    return _SHARES[blake2b(text.encode(), digest_size=1).digest()[0] % len(_SHARES)]


def _text_and_label(intent: str, parts: Parts) -> dict[str, Any]:
    return {"text": " ".join(words for _, words in parts), "label": intent}


def _words_and_tags(intent: str, parts: Parts) -> dict[str, Any]:
    words, labels = [], []
    for slot, stretch in parts:
        for index, word in enumerate(stretch.split()):
            words.append(word)
            labels.append("O" if slot is None else f"{'I' if index else 'B'}-{slot}")
    return {"words": words, "labels": labels}


def _conversation(intent: str, parts: Parts) -> dict[str, Any]:
    answer: dict[str, Any] = {"intent": intent}
    for slot, words in parts:
        if slot is not None:
            answer.setdefault(slot, []).append(words)
    command = " ".join(words for _, words in parts)
    return {
        "messages": [
            {"role": "user", "content": command},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


_VALUES = {
    "sequence-classification": _text_and_label,
    "token-classification": _words_and_tags,
    "causal-lm": _conversation,
}
