"""The words of the scripts: what is said, asked for and listened to. Every list is for both splits
unless it says otherwise.
"""

from functools import cache
from importlib.resources import files
from typing import Final

__all__ = [
    "CHATTER",
    "CUES",
    "FILLERS",
    "NAMES",
    "NUMBERS",
    "QUESTIONS",
    "TENS",
    "WORDS",
    "common_words",
]

NUMBERS: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS: Final = (*("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),)
# What the model is asked to say.
WORDS: Final = (
    *("blue", "stretch", "tea", "water", "stop", "breathe", "lunch", "now", "ready", "coffee"),
    *("dinner", "bread", "medicine", "laundry", "sleep", "walk", "yellow", "purple", "green"),
    *("hello", "thanks", "banana", "lemon", "pizza", "homework", "phone", "window", "party"),
    *("sugar", "garlic", "carrot", "kettle", "oven", "garden", "plants", "posture", "shoulders"),
    *("smile", "relax", "focus", "break", "time", "done", "finish", "begin", "jump"),
)
# What the model listens for.
CUES: Final = (
    *("apple", "window", "garden", "music", "seven", "paper", "orange", "river", "mountain"),
    *("bicycle", "doctor", "kitchen", "summer", "winter", "station", "island", "monkey", "tiger"),
    *("piano", "guitar", "castle", "bridge", "forest", "pencil", "camera", "ticket", "market"),
    *("pocket", "rabbit", "silver", "button", "letter", "teacher", "village", "weather", "candle"),
    *("cotton", "basket", "hammer", "ladder", "pillow", "turtle", "spider", "rocket"),
)
FILLERS: Final = (
    ("yesterday i walked past the", "and then it began to rain a little"),
    ("my sister told me about the", "that she had seen the other day"),
    ("there was only one", "left on the table in the morning"),
    ("i never thought that the", "could make such a difference"),
    ("we talked about the", "for almost an hour after dinner"),
    ("he said that every", "has a story of its own"),
    ("they were looking for a", "but nobody knew where it was"),
    ("she drew a", "on the back of the page"),
    ("when we came home the", "was not where we had put it"),
    ("i would like to know what the", "has to do with it"),
    ("somebody left a", "in front of our door"),
    ("in the end the", "was all that they remembered"),
)
CHATTER: Final = (
    "the train to the city leaves at noon",
    "i think we should paint the kitchen first",
    "did you feed the cat this morning",
    "they moved the meeting to next week",
    "my brother is learning to play the drums",
    "the new neighbours have a very loud dog",
    "we ran out of milk again",
    "somebody parked in front of the gate",
    "the film was much longer than i expected",
    "it is getting dark so early now",
    "her flight was delayed by three hours",
    "the library closes at six on friday",
    "i left my umbrella at the office",
    "we could take the bus and walk the rest",
    "that restaurant has changed its menu",
    "the kids are playing outside",
)
NAMES: Final = ("anna", "peter", "maria", "david", "sarah", "thomas", "julia", "martin", "lucy")
QUESTIONS: Final = {
    "weather in oslo": "rain",
    "height of everest": "8849 m",
    "time in tokyo": "9 pm",
    "price of gold": "up 2%",
    "next bus home": "in 6 min",
    "score of the match": "3 to 1",
    "capital of peru": "lima",
    "weather in madrid": "sunny",
    "price of silver": "down 1%",
    "next train to paris": "at noon",
    "time in london": "4 am",
    "length of the nile": "6650 km",
    "mayor of berlin": "no news",
    "traffic on the bridge": "a jam",
    "opening hours of the museum": "10 to 6",
    "age of the moon": "4.5 bn y",
}


@cache
def common_words() -> tuple[str, ...]:
    """Only dictated, so that a model hears more words than the requests are made of."""
    text = (files("tml_core.data") / "common_words.txt").read_text(encoding="utf-8")
    return tuple(text.split())
