"""
The practice corpus: a story grammar in the style of TinyStories, for a first run without a network.

Each story has a random hero, friend, place and plot: somebody wants something, something is in the
way, people talk, and the story ends. Every sentence has several wordings and the slots are drawn
independently, so stories hardly ever repeat, and a model can learn to generalise.

The words and sentences are in synth.ini. A section with a summary is a plot. `opening` is the
section that starts the story (default: with_friend). `features` are the dataset's. All other
settings fill slots: one of their lines is drawn, and its parts, separated by semicolons, go to the
slots in order. If there are several slots but the lines have only one part, each slot gets a
different line. In `text`, blank lines separate sentences. A sentence has one wording per line, of
which one is drawn. Other lines:

    ---             start a new paragraph
    > section       insert the sentences of that section
    30% Feature     above wordings: the probability of the sentence, and the feature it adds

To add a plot, add a section. To add words, extend the lists.
"""

import configparser
import functools
import os
import random
import re

PRONOUNS = {"she": ("her", "her"), "he": ("him", "his")}
CHANCE = re.compile(r"(\d+)%(?: (\w+))?")


@functools.cache
def grammar():
    """Return the sections of synth.ini, {name: {setting: text}}."""
    parser = configparser.RawConfigParser(delimiters="=", comment_prefixes="#")
    with open(os.path.join(os.path.dirname(__file__), "synth.ini"), encoding="utf-8") as f:
        parser.read_file(f)
    return {name: dict(parser[name]) for name in parser.sections()}


def words(section, name):
    return grammar()[section][name].split(", ")


def draw_character(rng, taken=""):
    """Draw a character: return (name, kind, "he" or "she"), with a name other than `taken`."""
    number = rng.random()
    if number < 0.7:
        kind, he = ("girl", "she") if number < 0.35 else ("boy", "he")
        names = words("names", kind)
    else:
        names, kind = words("names", "animal"), rng.choice(words("kinds", "animal"))
        he = rng.choice(list(PRONOUNS))
    names = [name for name in names if name != taken]
    (name,) = rng.choices(names, [1 / (i + 1) for i in range(len(names))])
    return name, kind, he


class Story:
    """The slots of one story and its paragraphs."""

    def __init__(self, rng):
        self.rng, self.paragraphs, self.features = rng, [[]], {"Dialogue"}
        hero, kind, he = draw_character(rng)
        friend, friends_kind, friends_he = draw_character(rng, taken=hero)
        him, his = PRONOUNS[he]
        self.slots = {"hero": hero, "kind": kind, "he": he, "him": him, "his": his}
        self.slots |= {"He": he.capitalize(), "His": his.capitalize()}
        self.slots |= {"friend": friend, "fkind": friends_kind, "fhe": friends_he}
        self.slots |= {name: rng.choice(words("words", name)) for name in grammar()["words"]}
        self.slots["place"] = self.slots["at"].split()[-1]

    def draw(self, names, value):
        """Fill slots, their names separated by commas, from a setting of a plot; see above."""
        names, rows = names.split(", "), [line.split("; ") for line in value.split("\n") if line]
        if len(rows) == 1:
            row = rows[0]
        elif len(rows[0]) == len(names):
            row = self.rng.choice(rows)
        else:
            row = [part for (part,) in self.rng.sample(rows, len(names))]
        for name, part in zip(names, row, strict=True):
            self.slots[name] = part.format(**self.slots)

    def tell(self, section):
        """Add the sentences of a section."""
        for block in grammar()[section]["text"].strip().split("\n\n"):
            first, *rest = wordings = block.split("\n")
            if first == "---":
                self.paragraphs.append([])
            elif first.startswith("> "):
                self.tell(first[2:])
            elif not (match := CHANCE.fullmatch(first)):
                self.say(wordings)
            elif self.rng.random() < int(match[1]) / 100:
                self.features |= {match[2]} - {None}
                self.say(rest)

    def say(self, wordings):
        text = self.rng.choice(wordings).format(**self.slots)
        self.paragraphs[-1].append(re.sub("( a|A) (?=[aeiou])", r"\1n ", text))


def make_story(rng):
    """Return a story in the dataset's format: {"story", "instruction", "summary", "source"}."""
    s = Story(rng)
    name = rng.choice([name for name, section in grammar().items() if "summary" in section])
    plot = {"opening": "with_friend", "features": "", **grammar()[name]}
    s.features |= set(plot["features"].split())
    s.tell(plot["opening"])
    for setting, value in plot.items():
        if setting not in ("opening", "features", "summary", "text"):
            s.draw(setting, value)
    s.tell(name)
    story = "\n".join(map(" ".join, s.paragraphs))
    said = set(re.findall(r"\w+", story))
    drawn = [s.slots[name] for name in ("toy", "color", "mood", "place", "food")]
    drawn = [word for word in drawn if word in said]
    features = sorted(s.features)
    prompt = (
        "Write a short story (3-5 paragraphs) which only uses very simple words that a 3 year old "
        f"child would understand. The story should use these words: {', '.join(drawn) or 'friend'}."
        f" It should have these features: {', '.join(features)}."
    )
    return {
        "story": story,
        "instruction": {"prompt:": prompt, "words": drawn, "features": features},
        "summary": plot["summary"].format(**s.slots),
        "source": "synth",
    }


def make_stories(n, seed):
    """Yield n stories, the same for the same seed on every platform."""
    rng = random.Random(seed)
    return (make_story(rng) for _ in range(n))
