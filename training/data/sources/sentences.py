"""Draw the spoken lines of scenes, each with questions about its content.

A line is one short English sentence from a template with typed slots. Each question of a template has one of the slots
as its answer, so a scene's lines also give its questions. This module depends on no audio.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

SLOTS: dict[str, tuple[str, ...]] = {
    "name": tuple(
        "Anna Ben Carla David Emma Frank Grace Henry Isabel Jack Kate Leo Maria Nick Olivia Paul Rachel Sam "
        "Tina Victor Wendy Adam Alice Bob Clara Daniel Ellen Felix George Hannah Ivan Julia Kevin Laura "
        "Martin Nora Oscar Peter Rosa Simon Sarah Thomas Helen Walter Diana Eric Fiona Lucy Mark Robert".split()
    ),
    "day": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "month": tuple("January February March April May June July August September October November December".split()),
    "city": tuple(
        "London Paris Berlin Madrid Rome Boston Chicago Denver Dallas Dublin Vienna Oslo Cairo Tokyo Sydney "
        "Toronto Lisbon Athens Prague Geneva Moscow Mumbai Seattle Houston Miami Atlanta Phoenix Cambridge "
        "Oxford Brussels".split()
    ),
    "food": tuple(
        "apples bread butter cheese coffee eggs fish garlic honey lemons milk mushrooms noodles onions "
        "oranges pasta pepper potatoes rice salad salt soup spinach sugar tea tomatoes yogurt bananas carrots "
        "chocolate chicken beans cake cookies cream flour grapes juice olives pancakes peaches pears pizza "
        "plums sausages strawberries water".split()
    ),
    "object": tuple(
        "backpack basket bicycle blanket book bottle bowl box brush bucket camera candle chair clock coat "
        "computer cup desk diary drill envelope guitar hammer hat helmet jacket kettle key knife ladder lamp "
        "laptop letter map mirror newspaper notebook package pencil phone picture pillow plate printer radio "
        "ring rope ruler scissors shirt shovel suitcase sweater table telephone tent ticket towel umbrella "
        "wallet watch".split()
    ),
    "number": tuple(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
    ),
    "hour": tuple("one two three four five six seven eight nine ten eleven noon midnight".split()),
    "color": tuple("red blue green yellow black white brown purple orange pink gray silver golden".split()),
    "animal": tuple(
        "cat dog horse rabbit mouse parrot turtle goat sheep duck fox wolf bear lion tiger monkey elephant "
        "spider snake frog pigeon owl donkey camel dolphin".split()
    ),
    "job": tuple(
        "teacher doctor nurse driver baker farmer lawyer painter singer writer engineer manager plumber "
        "dentist pilot waiter gardener librarian mechanic actor butcher carpenter tailor student scientist".split()
    ),
    "place": tuple(
        "airport bakery bank beach bridge cafe castle church cinema farm forest garage garden harbor hospital "
        "hotel island kitchen lake library market mountain museum office park pharmacy restaurant river "
        "school square stadium station supermarket theater tower tunnel valley village warehouse".split()
    ),
    "weather": tuple("sunny rainy windy cloudy foggy snowy stormy freezing humid warm".split()),
    "mood": tuple(
        "tired happy angry hungry thirsty nervous excited bored proud lonely worried surprised sleepy "
        "cheerful jealous".split()
    ),
    "sport": tuple(
        "football tennis basketball hockey chess golf volleyball baseball cards badminton cricket rugby".split()
    ),
    "part": tuple("head back shoulder knee ankle finger tooth stomach elbow neck throat wrist".split()),
    "vehicle": tuple("car bus train taxi boat plane truck motorcycle ferry subway van tractor".split()),
    "subject": tuple(
        "history biology chemistry geography music physics mathematics economics poetry science law medicine".split()
    ),
    "relative": tuple(
        "mother father sister brother aunt uncle cousin grandmother grandfather daughter son wife husband".split()
    ),
    "quality": tuple(
        "heavy cheap expensive broken dirty clean empty beautiful strange narrow huge tiny perfect useful "
        "dangerous comfortable modern ancient quiet bright".split()
    ),
}
"""Slot name -> its words, all of them likely in typed questions."""

# (sentence, ((question, slot of its answer), ...)). `{name2}` draws a second, different word of the slot `name`.
TEMPLATES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("{name} cannot come on {day}", (("Who cannot come on {day}?", "name"), ("When can {name} not come?", "day"))),
    (
        "the meeting starts at {hour} on {day}",
        (("When does the meeting start?", "hour"), ("On which day is the meeting?", "day")),
    ),
    (
        "please buy {food} and {food2}",
        (("What should be bought with the {food2}?", "food"), ("What should be bought with the {food}?", "food2")),
    ),
    (
        "I left my {object} at the {place}",
        (("What was left at the {place}?", "object"), ("Where was the {object} left?", "place")),
    ),
    (
        "the train to {city} leaves at {hour}",
        (("Where does the train go?", "city"), ("When does the train leave?", "hour")),
    ),
    (
        "my {relative} works as a {job}",
        (("Who works as a {job}?", "relative"), ("What is the job of the {relative}?", "job")),
    ),
    (
        "{name} is moving to {city} in {month}",
        (
            ("Who is moving to {city}?", "name"),
            ("Where is {name} moving?", "city"),
            ("When is {name} moving?", "month"),
        ),
    ),
    (
        "it will be {weather} in {city} tomorrow",
        (("How will the weather be in {city}?", "weather"), ("Which city is mentioned?", "city")),
    ),
    ("we need {number} more {objects}", (("How many more {objects} are needed?", "number"),)),
    (
        "the {color} {object} costs {number} dollars",
        (("How much does the {object} cost?", "number"), ("Which color is the {object}?", "color")),
    ),
    (
        "did you see the {animal} near the {place}",
        (("Which animal was near the {place}?", "animal"), ("Where was the {animal}?", "place")),
    ),
    ("{name} feels very {mood} today", (("Who feels {mood}?", "name"), ("How does {name} feel?", "mood"))),
    ("let us play {sport} after lunch", (("What shall be played after lunch?", "sport"),)),
    ("my {part} hurts since {day}", (("What hurts?", "part"), ("Since when does it hurt?", "day"))),
    (
        "I take the {vehicle} to the {place}",
        (("How does the speaker travel?", "vehicle"), ("Where does the speaker go?", "place")),
    ),
    (
        "{name} studies {subject} in {city}",
        (
            ("What does {name} study?", "subject"),
            ("Who studies {subject}?", "name"),
            ("Where does {name} study?", "city"),
        ),
    ),
    (
        "the {object} is too {quality} for me",
        (("What is too {quality}?", "object"), ("What is wrong with the {object}?", "quality")),
    ),
    (
        "call {name} before {hour}",
        (("Who should be called?", "name"), ("Before what time should {name} be called?", "hour")),
    ),
    (
        "there are {number} people at the {place}",
        (("How many people are at the {place}?", "number"), ("Where are the people?", "place")),
    ),
    (
        "{name} ordered {food} with {food2}",
        (("Who ordered food?", "name"), ("What did {name} order with the {food2}?", "food")),
    ),
    (
        "our {animal} is hiding under the {object}",
        (("Which animal is hiding?", "animal"), ("What is the {animal} hiding under?", "object")),
    ),
    ("turn left at the {place}", (("Where should one turn left?", "place"),)),
    ("the {job} will arrive on {day}", (("Who will arrive on {day}?", "job"), ("When will the {job} arrive?", "day"))),
    ("I forgot to bring the {object}", (("What was forgotten?", "object"),)),
    ("happy birthday {name}", (("Whose birthday is it?", "name"),)),
    (
        "{name} found a {color} {object}",
        (
            ("Who found the {object}?", "name"),
            ("What did {name} find?", "object"),
            ("Which color is the {object}?", "color"),
        ),
    ),
    ("the {vehicle} was late again", (("What was late?", "vehicle"),)),
    ("can you lend me {number} dollars", (("How many dollars are asked for?", "number"),)),
    ("the flight from {city} was canceled", (("Which flight was canceled?", "city"),)),
    (
        "{name} lives next to the {place}",
        (("Who lives next to the {place}?", "name"), ("What does {name} live next to?", "place")),
    ),
    (
        "your {relative} is waiting at the {place}",
        (("Who is waiting?", "relative"), ("Where is the {relative} waiting?", "place")),
    ),
    ("the exam in {subject} is on {day}", (("Which subject is the exam in?", "subject"), ("When is the exam?", "day"))),
    ("I would like some {food} please", (("What would the speaker like?", "food"),)),
    ("do not open the {color} door", (("Which color is the door?", "color"),)),
    (
        "{name} and {name2} got married in {month}",
        (("Who married {name2}?", "name"), ("When did they get married?", "month")),
    ),
    ("what a {quality} {place}", (("What is the {place} like?", "quality"), ("Which place is meant?", "place"))),
    ("the {animal} ate all the {food}", (("What ate the {food}?", "animal"), ("What did the {animal} eat?", "food"))),
    (
        "she paid {number} euros for the {object}",
        (("How many euros were paid?", "number"), ("What was paid for?", "object")),
    ),
    ("where is the {object} I gave you", (("What is being looked for?", "object"),)),
    ("good morning everyone", ()),
    ("thank you very much", ()),
    ("see you next week", ()),
    ("I do not understand the question", ()),
    ("that sounds like a great idea", ()),
    ("are you ready to go", ()),
    ("sorry I am running late", ()),
    ("nobody told me about that", ()),
    ("yes of course", ()),
    ("please close the window", ()),
    ("we should leave right now", ()),
    ("how was your weekend", ()),
    ("I will think about it", ()),
)

_SLOT = re.compile(r"\{([a-z]+)(2?)\}")


def plural(noun: str) -> str:
    """Return the plural of a word of the slot `object`."""
    irregular = {"knife": "knives", "diary": "diaries", "scissors": "scissors"}
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


SLOTS["objects"] = tuple(plural(noun) for noun in SLOTS["object"])


@dataclass(frozen=True)
class LineQuestion:
    """A question about one line, with its answer and its slot, the source of wrong choices."""

    question: str
    answer: str
    slot: str


@dataclass(frozen=True)
class Line:
    """One spoken sentence with its content questions: lower-case words except names, no final stop."""

    text: str
    questions: tuple[LineQuestion, ...]
    is_open: bool = False
    """True for open text (`training/data/sources/open_text.py`), False for a template's sentence."""


def vocabulary() -> frozenset[str]:
    """Return every distinct lower-case word of possible lines."""
    words: set[str] = set()
    for sentence, _ in TEMPLATES:
        words.update(_SLOT.sub("", sentence).lower().split())
    for fillers in SLOTS.values():
        words.update(word.lower() for word in fillers)
    return frozenset(words)


def draw_line(rng: random.Random) -> Line:
    """Draw one line; templates with more slots have more weight, so that content outweighs small talk."""
    weights = [1 + 2 * len(_SLOT.findall(sentence)) for sentence, _ in TEMPLATES]
    sentence, _ = rng.choices(TEMPLATES, weights=weights)[0]
    filled: dict[str, str] = {}
    for slot, second in _SLOT.findall(sentence):
        options = [word for word in SLOTS[slot] if word not in filled.values()]
        filled[slot + second] = rng.choice(options)

    def fill(text: str) -> str:
        return _SLOT.sub(lambda match: filled[match[1] + match[2]], text)

    return line_from_text(fill(sentence))


def _pattern(sentence: str) -> re.Pattern[str]:
    parts: list[str] = []
    position = 0
    for match in _SLOT.finditer(sentence):
        parts.append(re.escape(sentence[position : match.start()]))
        parts.append(f"(?P<{match[1]}{match[2]}>{'|'.join(SLOTS[match[1]])})")
        position = match.end()
    return re.compile("".join(parts) + re.escape(sentence[position:]))


_PATTERNS = tuple((_pattern(sentence), questions) for sentence, questions in TEMPLATES)


@lru_cache(maxsize=65_536)
def line_from_text(text: str) -> Line:
    """Return the line of a text with the questions of its template; open text has none."""
    for pattern, questions in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is not None:
            filled = match.groupdict()

            def fill(template: str, filled: dict[str, str] = filled) -> str:
                return _SLOT.sub(lambda slot: filled[slot[1] + slot[2]], template)

            return Line(
                text=text,
                questions=tuple(LineQuestion(fill(q), filled[answer], answer.rstrip("2")) for q, answer in questions),
            )
    return Line(text, (), is_open=True)
