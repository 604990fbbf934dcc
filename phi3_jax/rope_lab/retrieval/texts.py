"""Lines, words and names of retrieval tasks, which are our own."""

from itertools import product

FILLER = (
    "The kettle was put on the stove before anyone came down.",
    "A grey cat slept on the wall in the sun.",
    "Somebody had left the gate open again.",
    "The road goes along the river and over the bridge.",
    "In the garden the pears were nearly ripe.",
    "Rain fell in the hills, and the valley stayed dry.",
    "The baker closes early when the fair is in town.",
    "A boat lay on the sand with its oars beside it.",
    "They talked about the weather and then about nothing.",
    "The clock in the hall is always a little slow.",
    "Two boys carried a ladder past the window.",
    "Snow stays longest on the north side of the roof.",
    "The letters were tied with a blue ribbon.",
    "At the market they sell apples, rope and candles.",
    "The old dog knew the way home by itself.",
    "Wind moved the curtains, and the lamp went out.",
    "The train was late, so we walked to the next village.",
    "Nobody remembered who had planted the oak.",
    "The soup needs salt, and the bread is still warm.",
    "Behind the mill the path turns towards the wood.",
)
"""Lines without numbers."""

_WORDS = """
acorn amber anvil badger barley basket beacon beetle bishop bottle bramble bucket butter button camel
canvas carpet castle cedar cherry chimney cider cobweb copper coral cotton cradle crayon cricket dagger
dolphin donkey dragon falcon feather fiddle flannel fossil furnace garlic ginger glacier goblet gravel
hammer harbor hazel helmet hornet island ivory jacket jasmine jungle kitten lantern lemon lizard locket
magnet mango marble meadow melon mirror mitten monkey mustard needle nettle nutmeg onion orchid otter
oyster paddle parcel parrot pebble pepper pigeon pillow planet pocket puzzle quarry rabbit raven saddle
salmon satchel shovel silver spider spoon squirrel statue sugar temple thimble thunder tiger timber
trumpet tulip tunnel turnip turtle velvet violin walnut whistle willow zebra
"""

WORDS = tuple(_WORDS.split())
"""Words that pass keys belong to; none is in the filler."""

VARIABLES = tuple(map("".join, product("BDFKLMNPRT", "AEIOU", "BDFKLMNPRT")))
"""Names of variables, of three capitals."""

NUMBERS = (10_000, 100_000)
"""The range of pass keys and of values of variables, which have five digits."""
