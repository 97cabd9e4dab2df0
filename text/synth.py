"""
The practice corpus: a story grammar in the manner of TinyStories, for a first run without network.

A story draws a hero, a friend, a place and one of the plots below: somebody wishes for something,
something is in the way, people talk, and it ends. Every sentence has several wordings and the slots
are drawn independently, so stories hardly ever repeat, and a model has something to generalise.

To add a plot: a function (Story) -> None in PLOTS that says sentences; to add words: the lists.
"""

import random
import re

# The first of the names are drawn most often, as in TinyStories: with all equally likely, a small
# model does not learn in minutes to tell them apart, and mixes up who is who.
GIRLS = "Lily Mia Anna Sara Lucy Emma Zoe Ella Amy Rose".split()
BOYS = "Tim Tom Ben Max Sam Jack Leo Finn Joe Bob".split()
ANIMALS = (
    "cat dog bird rabbit bear fox mouse frog duck squirrel turtle puppy kitten pony owl hedgehog "
    "lamb monkey"
).split()
ANIMAL_NAMES = "Fluffy Spot Bella Coco Pip Whiskers Sunny Berry Patch Honey".split()
PLACES = (  # the last word names the place
    "in the park, in the garden, in the forest, at the beach, on the farm, at school, by the lake, "
    "in the village, by the river, on the hill, at the playground, at the market"
).split(", ")
TOYS = "ball kite doll car boat drum hat teddy train puzzle scarf balloon book robot".split()
FOODS = "apple cookie sandwich pancake pear muffin carrot bun".split()
WORDS = {  # for slots that are drawn independently
    "meal": "cake soup bread pie rice porridge".split(),
    "thing": "key ring button shell coin spoon sock feather marble ribbon".split(),
    "color": ["red", "blue", "green", "yellow", "pink", "white", "brown", "purple", "orange"],
    "look": ["big", "shiny", "soft", "pretty", "new", "old", "round", "warm"],
    "size": ["little", "small", "young", "tiny"],
    "mood": ["happy", "kind", "curious", "brave", "shy", "clever", "gentle", "cheerful", "quiet"],
    "weather": ["sunny", "windy", "warm", "cold", "rainy", "bright", "snowy"],
    "adult": ["mom", "dad", "grandma", "grandpa", "teacher", "neighbor"],
    "fruit": ["apples", "pears", "berries", "nuts", "carrots", "cherries"],
}


class Character:
    def __init__(self, rng, taken=()):
        kind = rng.random()
        if kind < 0.35:
            pool, self.kind, self.he, self.him, self.his = GIRLS, "girl", "she", "her", "her"
        elif kind < 0.7:
            pool, self.kind, self.he, self.him, self.his = BOYS, "boy", "he", "him", "his"
        else:
            pool, self.kind = ANIMAL_NAMES, rng.choice(ANIMALS)
            self.he, self.him, self.his = rng.choice([("she", "her", "her"), ("he", "him", "his")])
        names = [n for n in pool if n not in taken]
        (self.name,) = rng.choices(names, [1 / (i + 1) for i in range(len(names))])


class Story:
    """What is drawn for one story, and its paragraphs as they are said."""

    def __init__(self, rng):
        self.rng = rng
        hero = Character(rng)
        friend = Character(rng, taken=(hero.name,))
        at_place = rng.choice(PLACES)
        self.place = at_place.split()[-1]
        self.toy, self.food = rng.choice(TOYS), rng.choice(FOODS)
        self.slots = {
            "hero": hero.name,
            "he": hero.he,
            "He": hero.he.capitalize(),
            "him": hero.him,
            "his": hero.his,
            "His": hero.his.capitalize(),
            "kind": hero.kind,
            "friend": friend.name,
            "fhe": friend.he,
            "fkind": friend.kind,
            "place": self.place,
            "at": at_place,
            "toy": self.toy,
            "food": self.food,
        }
        self.slots |= {slot: rng.choice(words) for slot, words in WORDS.items()}
        self.paragraphs, self.current = [], []
        self.features, self.summary = {"Dialogue"}, ""

    def say(self, *wordings):
        """Add one of some wordings, its slots filled, to the paragraph."""
        text = self.rng.choice(wordings).format(**self.slots)
        for vowel in "aeiou":
            text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
        self.current.append(text)

    def maybe(self, chance, *wordings):
        if self.rng.random() < chance:
            self.say(*wordings)

    def end_paragraph(self):
        if self.current:
            self.paragraphs.append(" ".join(self.current))
            self.current = []

    def text(self):
        self.end_paragraph()
        return "\n".join(self.paragraphs)


def opening(s, alone):
    s.say(
        "Once upon a time, there was a {size} {kind} named {hero}.",
        "Once upon a time, there was a {mood} {kind} named {hero}.",
        "Once upon a time, there was a {mood} {kind} called {hero} who lived near the {place}.",
        "Once upon a time, a {size} {kind} named {hero} lived in a {color} house near the {place}.",
        "One day, a {size} {kind} named {hero} went to play {at}.",
        "One {weather} day, a {mood} {kind} named {hero} was {at}.",
        "There was once a {mood} {kind} whose name was {hero}.",
    )
    # Names that come again soon teach a model to look back for them
    about = [
        "{hero} liked to play {at}.",
        "{hero} loved to sing and run {at}.",
        "{hero} had a {color} {toy} and took it everywhere.",
        "Every day {hero} went for a walk {at}.",
    ]
    if not alone:
        about += [
            "{hero} had a good friend named {friend}. {hero} and {friend} always played together.",
            "{hero} had a friend. {His} friend's name was {friend}. {friend} was a {fkind}.",
            "Everyone knew {hero} because {hero} was so {mood}.",
        ]
    s.say(*about)


def greet_friend(s):
    s.say(
        "Then {friend} the {fkind} came by. {friend} saw that {hero} was sad.",
        "{hero} met {friend}. {friend} was a {fkind}.",
        "Just then, {his} friend {friend} came along. {friend} looked at {hero}.",
        "A {fkind} named {friend} saw {hero}. {friend} stopped.",
    )
    s.say(
        '"What is wrong, {hero}?" asked {friend}.',
        '"Why are you so sad?" {friend} asked.',
        '"Hello, {hero}! Can I help you?" said {friend}.',
        '"You look sad," said {friend}. "What happened?"',
    )


def happy_end(s, *last):
    s.end_paragraph()
    s.maybe(0.7, *last)
    s.say(
        "{hero} was very happy.",
        "{hero} smiled and gave {friend} a big hug.",
        "{hero} and {friend} laughed and danced {at}.",
        '"Thank you, {friend}!" said {hero}. "You are a good friend."',
        "{hero} felt proud and warm inside.",
    )
    s.say(
        "From that day on, {hero} and {friend} were best friends.",
        "They played together until the sun went down.",
        "Then they went home and had some {meal}.",
        "That night, {hero} slept well and dreamed of the {place}.",
        "And they all lived happily ever after.",
        "{He} could not wait to come back the next day.",
        "When {he} got home, {he} told {his} {adult} all about it.",
    )
    if s.rng.random() < 0.3:
        s.features.add("MoralValue")
        s.say("{hero} learned that {moral}.", "Now {he} knew that {moral}.")


def out_of_reach(s):
    """A toy is up where nobody can get it."""
    where, how = s.rng.choice(
        [
            ("in a tall tree", "up the tree"),
            ("on the roof", "onto the roof"),
            ("on a high wall", "up the wall"),
            ("on a high shelf", "up the shelf"),
        ]
    )
    s.slots.update(where=where, how=how, moral="it is good to ask for help")
    s.say(
        "One day, {he} threw {his} {toy} too high, and it got stuck {where}.",
        "The wind took {his} {color} {toy} and dropped it {where}.",
        "{hero} saw a {look} {color} {toy} {where} and wanted to have it.",
    )
    s.say(
        "{He} jumped and jumped, but it was too high.",
        "{He} tried to climb {how}, but {he} slipped and fell.",
        "{He} threw a stick at it, but the stick got stuck too.",
    )
    s.say("{hero} sat down and cried.", "{hero} did not know what to do.", "{hero} was very sad.")
    s.end_paragraph()
    greet_friend(s)
    s.say(
        '"My {toy} is {where}, and I cannot reach it," said {hero}.',
        '"I want that {toy}, but it is too high," {hero} said.',
    )
    s.say(
        '"Do not worry. Stand on my back!" said {friend}.',
        '"I know what to do," said {friend}. "Let us get a long ladder."',
        '"We can do it together," {friend} said. "Hold my hand."',
    )
    s.end_paragraph()
    s.say(
        "{hero} reached up as far as {he} could and took the {toy}.",
        "Soon the {toy} was safe on the ground again.",
        "They pushed and pulled, and at last the {toy} came down.",
    )
    s.summary = "{hero} cannot reach a {toy} {where}, and {friend} helps to get it down."
    happy_end(s, "They took turns with the {toy}.", "The {toy} was not even broken.")


def learn(s):
    """Somebody wants to be able to do something and practises."""
    skill, fail, tip = s.rng.choice(
        [
            ("swim", "{he} went under and got water in {his} nose", "kick your legs"),
            ("ride a bike", "{he} fell into the grass", "look ahead, not down"),
            ("whistle", "only air came out", "make your mouth small and round"),
            ("draw a horse", "it looked like a potato", "start with the big shapes"),
            ("dance", "{he} stepped on {his} own feet", "listen to the music first"),
            ("climb the hill", "{he} got tired and stopped", "take small steps"),
            ("sing", "it sounded like a door", "take a deep breath"),
            ("skip stones", "the stones just sank", "throw them low and flat"),
            ("bake bread", "it was as hard as a stone", "wait until it is big and soft"),
            ("jump rope", "{he} got all tied up", "count to three and jump"),
        ]
    )
    s.slots.update(skill=skill, tip=tip, fail=fail.format(**s.slots))
    s.slots.update(moral="you get better if you keep trying")
    s.say(
        "More than anything, {hero} wanted to {skill}.",
        "{hero} saw others {skill} and wanted to do it too.",
        '"I wish I could {skill}," said {hero}.',
    )
    s.say(
        "{He} tried, but {fail}.",
        "But the first time, {fail}.",
        "{He} went {at} to try, but {fail}.",
    )
    s.maybe(0.6, "Some children laughed.", "{hero} felt bad.", '"I will never learn," {he} said.')
    s.end_paragraph()
    greet_friend(s)
    s.say('"I want to {skill}, but I cannot," said {hero}.', '"It is too hard," said {hero}.')
    s.say(
        '"It was hard for me too," {friend} said. "You have to {tip}."',
        '"Let me show you," said {friend}. "First, {tip}. Then try again."',
        '{friend} thought for a moment. "Try to {tip}," {fhe} said.',
    )
    s.end_paragraph()
    s.say(
        "So {hero} tried again and again.",
        "Every day {hero} went out to practice with {friend}.",
        "{hero} took a deep breath and tried once more.",
    )
    s.say(
        "At last, {he} could {skill}!",
        "And one {weather} day, {he} did it!",
        "After a week, {he} could {skill} better than anyone {at}.",
    )
    s.summary = "{hero} wants to {skill} and learns it with the help of {friend}."
    happy_end(s, "Everyone clapped.", '"Look at me!" {hero} shouted.')


def lost(s):
    """A thing is lost and looked for in one place after another."""
    thing = s.rng.choice([s.slots["thing"], s.toy])
    spots = (
        "under the bed, behind the door, in the tall grass, under a big stone, in the kitchen, "
        "behind a tree, in {his} pocket, in a basket, under the table, next to the old well"
    ).split(", ")
    first, second, found = (spot.format(**s.slots) for spot in s.rng.sample(spots, 3))
    s.slots.update(lost=thing, spot1=first, spot2=second, spot3=found)
    s.slots.update(moral="you should take care of your things")
    s.say(
        "One day, {he} could not find {his} {color} {lost}.",
        "{hero} had a {look} {color} {lost}, but one morning it was gone.",
        "{hero} was playing {at} when {he} lost {his} {lost}.",
    )
    s.say(
        "{He} looked {spot1}, but it was not there.",
        "First, {he} looked {spot1}. There was nothing but dust.",
    )
    s.maybe(0.8, "Then {he} looked {spot2}, but it was not there.", "It was not {spot2} either.")
    s.end_paragraph()
    greet_friend(s)
    s.say(
        '"I lost my {lost}," said {hero}. "I have looked everywhere."',
        '"My {lost} is gone," {hero} said, and {he} began to cry.',
    )
    s.say(
        '"Let us look together," said {friend}.',
        '"Where did you see it last?" asked {friend}.',
        '"Did you look {spot3}?" asked {friend}.',
    )
    s.end_paragraph()
    s.say(
        "They looked {spot3}, and there it was!",
        '{friend} looked {spot3} and shouted, "Here it is!"',
        "Something {color} was {spot3}. It was the {lost}!",
    )
    s.summary = "{hero} loses a {lost} and finds it {spot3} with {friend}."
    happy_end(s, "{hero} put the {lost} in a safe place.", "{hero} held it tight.")


def share(s):
    """Two want the same thing, quarrel, and find a way."""
    what = s.rng.choice([s.toy, s.food])
    s.slots.update(what=what, moral="sharing is more fun than fighting")
    s.features.add("Conflict")
    s.say(
        "One {weather} day, {hero} and {friend} found a {look} {what} {at}.",
        "{hero} had a {look} {what}, and {friend} wanted it too.",
        "There was only one {what} left, but {hero} and {friend} both wanted it.",
    )
    s.end_paragraph()
    s.say('"It is mine!" said {hero}.', '"I saw it first!" shouted {hero}.')
    s.say('"No, it is mine!" said {friend}.', '"That is not fair!" {friend} cried.')
    s.say(
        "They pulled and pulled until they both fell down.",
        "They were so angry that they did not look at each other.",
        "{friend} began to cry and ran away.",
    )
    s.end_paragraph()
    s.say(
        'Their {adult} heard them and said, "Why do you not share?"',
        'Then their {adult} came and asked, "What would a good friend do?"',
    )
    s.say(
        "{hero} thought about it. {He} was sorry.",
        "{hero} looked at {friend} and felt bad.",
    )
    s.say(
        '"I am sorry," {hero} said. "Let us share the {what}."',
        '"You can have it first," said {hero}.',
        '"Half for you and half for me," {hero} said with a smile.'
        if what == s.food
        else '"First you, then me," {hero} said with a smile.',
    )
    s.summary = "{hero} and {friend} fight over a {what} and learn to share it."
    happy_end(s, '"Thank you," said {friend}. "I am sorry too."', "{friend} smiled again.")


def build(s):
    """Something is made, goes wrong, and is made again together."""
    made, mishap, fix = s.rng.choice(
        [
            ("sand castle", "a big wave washed it away", "build it away from the water"),
            ("tower of blocks", "it fell over with a loud noise", "put the big ones at the bottom"),
            ("snowman", "the sun came out and it got small", "build it in the shade"),
            ("bird house", "the wind blew the roof off", "use more nails"),
            ("paper boat", "it got wet and sank", "use a leaf and some wood"),
            ("birthday cake", "it fell on the floor", "start again and be careful"),
            ("tent", "the rain came in", "put big leaves on top"),
            ("bridge", "it broke in the middle", "use a strong log"),
        ]
    )
    s.slots.update(made=made, mishap=mishap, fix=fix, moral="two friends can do more than one")
    s.say(
        "{hero} wanted to make a {made} for {his} {adult}.",
        "One {weather} morning, {hero} began to make a {made}.",
        '"Today I will make the best {made} {at}," said {hero}.',
    )
    s.say("{He} worked all morning.", "It was hard work, but {he} did not stop.")
    s.say("But then {mishap}.", "It was almost done when {mishap}!", "Oh no! All at once {mishap}.")
    s.end_paragraph()
    greet_friend(s)
    s.say(
        '"Look at my {made}! All my work is gone," said {hero}.',
        '"I wanted to make a {made}," said {hero}.',
    )
    s.say(
        '"We can {fix}," said {friend}. "I will help you."',
        '"Next time, we have to {fix}," {friend} said. "Come on!"',
    )
    s.end_paragraph()
    s.say(
        "So they worked side by side, and soon the {made} was ready.",
        "This time it was even better than before.",
        "{friend} brought what they needed, and {hero} did the rest.",
    )
    s.summary = "{hero} makes a {made}, but {mishap}, and {friend} helps to make a new one."
    happy_end(s, "{His} {adult} loved it.", "It was the best {made} they had ever seen.")


def new_friend(s):
    """Somebody is alone and shy."""
    gift = s.rng.choice([s.toy, s.food, s.slots["thing"]])
    s.slots.update(gift=gift, moral="a small gift can make a big friend")
    s.say(
        "But {hero} had nobody to play with.",
        "{hero} was new {at} and did not know anyone.",
        "{hero} wanted a friend more than anything.",
    )
    s.say(
        "One day, {he} saw a {size} {fkind} sitting all alone {at}.",
        "There was a {fkind} named {friend} who always sat alone.",
    )
    s.say(
        "{hero} wanted to say hello, but {he} was scared.",
        "{hero} came closer, but the {fkind} ran and hid.",
    )
    s.end_paragraph()
    s.say(
        "So {he} took {his} {color} {gift} and put it on the ground.",
        "The next day, {hero} brought a {gift} and waited.",
        "Then {he} had an idea. {He} held out {his} {gift}.",
    )
    s.say('"This is for you," {hero} said softly.', '"Do you want to share my {gift}?" {he} asked.')
    s.say(
        'The {fkind} looked at it and came out. "Thank you," said {friend}.',
        '"For me?" asked {friend}. "Nobody ever gave me a {gift}."',
        '"I am {friend}," said the {fkind}. "I was scared of you too."',
    )
    s.end_paragraph()
    s.say("They talked and played all day.", "They sat down side by side and told stories.")
    s.summary = "{hero} is alone and makes friends with {friend} by giving away a {gift}."
    happy_end(s, '"Will you come back tomorrow?" asked {friend}.', "They were not shy any more.")


def greedy(s):
    """A warning is not heard, and it ends badly."""
    s.features.add("BadEnding")
    s.slots.update(moral="it is better to listen")
    s.say(
        "{hero} loved {fruit} more than anything.",
        "One day, {hero} found a tree full of {fruit} {at}.",
        "{hero} saw a big basket of {fruit} {at}.",
    )
    s.end_paragraph()
    s.say(
        '"Do not eat too many, or you will be sick," said {his} {adult}.',
        '"Please leave some for {friend}," said {his} {adult}.',
        '"Those are not ours, {hero}," {friend} said. "We must ask first."',
    )
    s.say(
        '"I do not care," said {hero}.',
        "But {hero} did not listen.",
        '"Just one more," said {hero}.',
    )
    s.say(
        "{He} ate and ate until all the {fruit} were gone.",
        "{He} took as many {fruit} as {he} could carry.",
    )
    s.end_paragraph()
    s.say(
        "Soon {his} tummy hurt so much that {he} could not walk.",
        "Then the branch broke, and {he} fell into the mud.",
        "When {friend} came, there was nothing left. {friend} went away and did not come back.",
    )
    s.say("{hero} cried and went home alone.", "{hero} had to stay in bed for three days.")
    s.say(
        '"I wish I had listened," {he} said.',
        "{hero} was very sorry, but it was too late.",
        "After that, nobody wanted to play with {him} for a long time.",
    )
    s.maybe(0.5, "{hero} learned that {moral}.")
    s.summary = "{hero} does not listen, takes all the {fruit}, and is sorry in the end."


PLOTS = [out_of_reach, learn, lost, share, build, new_friend, greedy]


def make_story(rng):
    """One story in the dataset's shape: {"story", "instruction", "summary", "source"}."""
    s = Story(rng)
    plot = rng.choice(PLOTS)
    opening(s, alone=plot is new_friend)
    plot(s)
    story = s.text()
    said = set(re.findall(r"\w+", story))
    words = [w for w in (s.toy, s.slots["color"], s.slots["mood"], s.place, s.food) if w in said]
    features = sorted(s.features)
    prompt = (
        "Write a short story (3-5 paragraphs) which only uses very simple words that a 3 year old "
        f"child would understand. The story should use these words: {', '.join(words) or 'friend'}."
        f" It should have these features: {', '.join(features)}."
    )
    return {
        "story": story,
        "instruction": {"prompt:": prompt, "words": words, "features": features},
        "summary": s.summary.format(**s.slots),
        "source": "synth",
    }


def make_stories(n, seed):
    """n stories, the same ones for the same seed on every platform."""
    rng = random.Random(seed)
    return (make_story(rng) for _ in range(n))
