"""Facts to hide in ordinary text, each with a question that shares hardly a word with it.

`{who}` is a random person and `{answer}` what is asked for. Whoever answers must link the two wordings: the words of
question and cue do not lead to the fact by themselves.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Fact:
    """Wording of a fact, of its question, and of how the answer to it begins, so that a model need only go on.

    A number is drawn from `least` to `most`, a name from a list.
    """

    fact: str
    question: str
    cue: str
    answer: Literal["number", "person", "place"] = "number"
    least: int = 1000
    most: int = 9999


FACTS = (
    Fact(
        "{who} keeps the spare key of the boathouse in locker {answer}.",
        "Which locker number must one open to get into {who}'s building by the water?",
        "One must open number",
    ),
    Fact(
        "The old piano of {who} was sold at the fair for {answer} crowns.",
        "What price did {who} get for the musical instrument?",
        "{who} got",
    ),
    Fact(
        "In the autumn {who} counted {answer} sheep on the moor.",
        "How large is the flock that belongs to {who}?",
        "The flock has",
    ),
    Fact(
        "Whoever wants to telephone {who} has to ask for extension {answer}.",
        "Which digits connect a caller with {who}?",
        "The number is",
        least=100,
        most=999,
    ),
    Fact(
        "The lighthouse in which {who} lives has {answer} steps.",
        "How many stairs does {who} climb to reach the lamp?",
        "{who} climbs",
        least=101,
        most=999,
    ),
    Fact(
        "For fishing in the pond of the abbey, {who} had to pay {answer} shillings.",
        "How much money did catching carp cost {who}?",
        "It cost {who}",
    ),
    Fact(
        "The iron chest in the cellar of {who} opens with the combination {answer}.",
        "What code unlocks the box that {who} has underground?",
        "The code is the number",
    ),
    Fact(
        "On the night train {who} was given berth {answer}.",
        "What is the number of the bed in which {who} slept on the railway?",
        "{who} slept in bed number",
        least=101,
        most=999,
    ),
    Fact(
        "The recipe of the plum cake was taught to {who} by {answer}.",
        "Who showed {who} how to bake that dessert with fruit?",
        "{who} learnt it from",
        "person",
    ),
    Fact(
        "All through the winter {who} lived in the village of {answer}.",
        "Where did {who} stay during the coldest months?",
        "{who} stayed in",
        "place",
    ),
    Fact(
        "The cracked fiddle of {who} was mended by {answer}.",
        "Which craftsman repaired the broken instrument that {who} plays?",
        "The craftsman was",
        "person",
    ),
    Fact(
        "{who} shares a workshop with a glassblower called {answer}.",
        "What is the name of the artisan in whose company {who} works?",
        "The artisan's name is",
        "person",
    ),
    Fact(
        "The map of the silver mine was drawn for {who} by {answer}.",
        "Whose hand made the plan of the tunnels that {who} carries?",
        "It is by the hand of",
        "person",
    ),
    Fact(
        "In May {who} will be married at {answer}.",
        "To which town do the guests travel for the wedding of {who}?",
        "They travel to",
        "place",
    ),
    Fact(
        "The grey donkey on which {who} learnt to ride was named {answer}.",
        "What did people call the animal that carried {who} as a child?",
        "Its name was",
        "person",
    ),
    Fact(
        "The oak table of {who} was ordered from a joiner in {answer}.",
        "From where does the wooden furniture of {who} come?",
        "It comes from",
        "place",
    ),
)

WHO = (
    "Marlow",
    "Tamsin",
    "Corwin",
    "Delphine",
    "Farida",
    "Ingmar",
    "Jocasta",
    "Lysander",
    "Odalys",
    "Percival",
    "Rosamund",
    "Zoltan",
)
NAMES = {
    "person": (
        "Ottilie",
        "Branimir",
        "Wenzel",
        "Isaura",
        "Quentin",
        "Philippa",
        "Torvald",
        "Mirabel",
        "Anselm",
        "Giselle",
        "Ludovic",
        "Saskia",
    ),
    "place": (
        "Larkhollow",
        "Brindmoor",
        "Eskwater",
        "Pellingford",
        "Thornwick",
        "Gullhaven",
        "Ravenstoke",
        "Millbourne",
        "Oxtarn",
        "Hawksdale",
        "Fernleigh",
        "Saltcombe",
    ),
}
