"""A data set that a grammar generates: commands to a home assistant, for demonstrations and tests."""

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
"""Phrases of one or more words, each with its slot."""

COUNTS: dict[Split, int] = {"train": 2000, "validation": 250, "test": 250}
"""Default number of rows of each split."""

# The hash of a sentence selects its split, so that no sentence is in two splits, for any seed.
_SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "train", "train", "validation", "test")


def _items(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_SLOTS = {
    "time": _items(
        "noon, midnight, seven, half past six, a quarter to nine, ten in the evening, eight thirty, five "
        "in the morning, twenty past four, three o'clock"
    ),
    "date": _items(
        "today, tomorrow, on monday, on friday, next sunday, this weekend, in two days, the day after "
        "tomorrow, on the first of may, next week"
    ),
    "length": _items(
        "ten minutes, one hour, ninety seconds, a quarter of an hour, three minutes, two and a half "
        "hours, forty five minutes, half a minute"
    ),
    "room": _items(
        "kitchen, bedroom, living room, cellar, hall, guest room, bathroom, attic, garage, dining room"
    ),
    "device": _items(
        "heater, fan, coffee machine, washing machine, television, air conditioner, oven, robot vacuum, "
        "kettle, dish washer"
    ),
    "color": _items("red, warm white, deep blue, green, soft orange, purple, cold white"),
    "number": _items("two, five, nineteen, twenty one, thirty, eighty, sixty five, twelve"),
    "song": _items(
        "paper boats, the long way round, winter garden, stay a while, blue horizon, one more train, "
        "river of glass, hello my sun, nine lanterns, slow rain"
    ),
    "artist": _items(
        "anna bell, the night owls, marco silva, green harbor, lena fox, the tin soldiers, oscar lane, "
        "silver fern, dj comet, rosa and the wolves"
    ),
    "city": _items(
        "paris, new york, lisbon, cape town, oslo, san diego, tokyo, rio de janeiro, vienna, nairobi, "
        "hong kong, quebec"
    ),
    "item": _items(
        "milk, olive oil, brown bread, eggs, toilet paper, apples, coffee beans, washing powder, rice, "
        "dark chocolate"
    ),
    "person": _items(
        "mom, doctor miller, tom, aunt clara, my boss, sara lopez, the neighbors, grandpa, ben, mister chen"
    ),
    "message": _items(
        "i am late, dinner is ready, call me back, happy birthday, see you soon, the train is full, bring "
        "the keys, we won the game"
    ),
}

_INTENTS = {
    "set_alarm": _items(
        "wake me up at {time}, wake me {date} at {time}, set an alarm for {time} {date}, i have to be up "
        "at {time} {date}, ring the bell at {time}, alarm at {time} {date}"
    ),
    "cancel_alarm": _items(
        "cancel the alarm at {time}, delete my {time} alarm {date}, no alarm {date}, i do not need to be "
        "woken at {time} {date}, forget the alarm for {time}, let me sleep {date}"
    ),
    "set_timer": _items(
        "start a timer for {length}, tell me when {length} are over, count down {length}, timer for the "
        "{device} {length}, remind me of the {device} in {length}, give me {length}"
    ),
    "play_music": _items(
        "play {song} by {artist}, put on {song}, i want to hear {artist}, play something by {artist}, "
        "play {song} in the {room}, music by {artist} in the {room}, start the song {song}"
    ),
    "turn_on_light": _items(
        "turn on the light in the {room}, lights on in the {room}, make the {room} bright, it is too dark "
        "in the {room}, light up the {room} in {color}, switch the {room} lamp on"
    ),
    "turn_off_light": _items(
        "turn off the light in the {room}, lights out in the {room}, make the {room} dark, it is too "
        "bright in the {room}, switch the {room} lamp off {date} at {time}"
    ),
    "set_color": _items(
        "make the {room} light {color}, change the lamp in the {room} to {color}, i want {color} light, "
        "color the {room} {color}, {color} light for the {room}, paint the {room} in {color} light"
    ),
    "set_temperature": _items(
        "set the {room} to {number} degrees, make it {number} degrees in the {room}, heat the {room} to "
        "{number} degrees at {time}, i want {number} degrees {date} in the {room}, cool the {room} down "
        "to {number}, {number} degrees for the {room}"
    ),
    "weather": _items(
        "what is the weather like in {city}, will it rain in {city} {date}, how warm is it in {city}, do "
        "i need an umbrella {date}, weather for {city} {date}, is there snow in {city} {date}"
    ),
    "switch_device": _items(
        "start the {device}, stop the {device} in the {room}, turn the {device} on at {time}, switch the "
        "{device} in the {room} off, let the {device} run for {length}, is the {device} on"
    ),
    "shopping_list": _items(
        "add {item} to the shopping list, we are out of {item}, put {number} {item} on the list, i need "
        "{item} and {item}, buy {item} {date}, take {item} off the shopping list"
    ),
    "send_message": _items(
        "tell {person} that {message}, write to {person} {message}, send {person} a message {message}, "
        "let {person} know {message}, text {person} {message}, message for {person} {message}"
    ),
    "travel_time": _items(
        "how long does it take to {city}, when do i have to leave for {city} {date}, how far is {city} "
        "from {city}, take me to {city}, is there a train to {city} at {time}, i have to be in {city} "
        "{date} at {time}"
    ),
}

# The empty ones are drawn too: many commands come without politeness.
_BEFORE = _items(",,, please, hey, hello house, okay, listen, excuse me, one more thing")
_AFTER = _items(",,,, please, thanks, thank you very much, my friend")
# Far more than it takes to find another new sentence.
_MAX_DRAWS = 2000


def generated_rows(split: Split, task: TaskName, count: int | None = None, *, seed: int = 0) -> Iterator[Row]:
    """Yields different sentences of the grammar, always the same ones for the same arguments.

    A smaller `count` yields the first rows of a larger one. `sequence-classification` has `text` and `label`,
    the intent; `token-classification` has `words` and `labels`, BIO tags of the slots; `causal-lm` has
    `messages`, a command and its answer in JSON.

    Raises:
        UserError: a name is unknown, or the grammar has fewer than `count` sentences.
    """
    for name, value, known in (("split", split, COUNTS), ("task", task, _VALUES)):
        if value not in known:
            raise UserError(f"{name}={value!r}; use one of {', '.join(map(repr, known))}")
    return _rows(split, task, COUNTS[split] if count is None else count, seed)


def _rows(split: Split, task: TaskName, count: int, seed: int) -> Iterator[Row]:
    generator = random.Random(f"{split} {seed}")
    texts: set[str] = set()
    while len(texts) < count:
        for _ in range(_MAX_DRAWS):
            intent, parts = _sentence(generator)
            text = " ".join(words for _, words in parts)
            if text not in texts and _split_of(text) == split:
                break
        else:
            raise UserError(
                f"count={count}: the grammar has little more than {len(texts)} sentences; use fewer"
            )
        texts.add(text)
        yield Row(_VALUES[task](intent, parts), Place(f"generated-{split}", len(texts), "row"))


def _sentence(generator: random.Random) -> tuple[str, Parts]:
    intent = generator.choice(list(_INTENTS))
    pieces = generator.choice(_INTENTS[intent]).split()
    parts: Parts = []
    for piece in [generator.choice(_BEFORE), *pieces, generator.choice(_AFTER)]:
        slot = piece[1:-1] if piece.startswith("{") else None
        if slot:
            # A slot never has the same value twice in a sentence: nobody travels from oslo to oslo.
            piece = generator.choice([words for words in _SLOTS[slot] if (slot, words) not in parts])
        if piece:
            parts.append((slot, piece))
    return intent, parts


def _split_of(text: str) -> Split:
    return _SPLITS[blake2b(text.encode(), digest_size=1).digest()[0] % len(_SPLITS)]


def _text_and_label(intent: str, parts: Parts) -> dict[str, Any]:
    return {"text": " ".join(words for _, words in parts), "label": intent}


def _words_and_tags(intent: str, parts: Parts) -> dict[str, Any]:
    words, labels = [], []
    for slot, phrase in parts:
        for index, word in enumerate(phrase.split()):
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
