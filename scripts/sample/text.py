"""The base model's text: a generator of small chats and documents in plain English.

All of it is made here from word lists and sentence patterns, so that it may be shipped. A text
is a list of chat messages, or a plain string for a document.
"""

from collections.abc import Callable
from random import Random

from sample.queries import CITIES, COLORS, PEOPLE, TABLES, random_query_of, words

Chat = list[dict[str, str]]
Turn = tuple[str, str]

ANIMALS = {
    "fox": ("forest", "berries", "clever"),
    "owl": ("old tree", "mice", "wise"),
    "duck": ("pond", "grass", "cheerful"),
    "bear": ("mountains", "honey", "strong"),
    "frog": ("pond", "flies", "noisy"),
    "horse": ("stable", "hay", "fast"),
    "goat": ("hills", "leaves", "stubborn"),
    "whale": ("ocean", "small fish", "gentle"),
    "rabbit": ("meadow", "carrots", "quick"),
    "cat": ("warm house", "fish", "curious"),
    "camel": ("desert", "dry plants", "patient"),
    "penguin": ("cold south", "fish", "funny"),
    "squirrel": ("park", "nuts", "busy"),
    "wolf": ("deep forest", "meat", "brave"),
}
CAPITALS = {
    "Norway": "Oslo",
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "old": "young",
    "happy": "sad",
    "dark": "light",
    "full": "empty",
    "high": "low",
    "early": "late",
    "dry": "wet",
    "easy": "hard",
    "loud": "quiet",
    "first": "last",
    "rich": "poor",
}
GROUPS = {
    "fruits": words("apple pear plum cherry peach orange lemon"),
    "animals": list(ANIMALS),
    "colors": COLORS,
    "cities": CITIES,
    "tools": words("hammer saw drill knife brush ladder"),
    "vegetables": words("carrot onion potato bean tomato cabbage"),
    "pieces of furniture": words("chair table desk sofa lamp mirror"),
    "musical instruments": words("piano violin flute drum guitar trumpet"),
}
ROOMS = {
    "kitchen": ("a large table", "fresh bread", "people cook and talk"),
    "library": ("many tall shelves", "old paper", "people read in silence"),
    "garden": ("a small pond", "roses", "children play after school"),
    "harbor": ("a long row of boats", "salt and fish", "sailors work all day"),
    "station": ("a big clock", "coffee", "travelers wait for their trains"),
    "market": ("colorful stands", "ripe fruit", "farmers sell vegetables"),
    "workshop": ("a heavy bench", "wood and oil", "a carpenter repairs chairs"),
    "school": ("bright classrooms", "chalk", "students learn new things"),
}
THINGS = words("kite ball book lamp clock hat boat drum key coat bicycle mirror")
RECIPES = {
    "tea": ("boil some water", "put the leaves into a cup", "pour the water over them"),
    "a salad": ("wash the vegetables", "cut them into pieces", "add oil and salt"),
    "soup": ("cut an onion and a potato", "cook them in water", "add a little salt"),
    "toast": ("cut two slices of bread", "heat them until they are brown", "add some butter"),
    "pancakes": ("mix flour, milk and eggs", "heat a pan", "bake the mix on both sides"),
    "a paper boat": ("take a sheet of paper", "fold it in the middle", "open the corners"),
    "a clean room": ("open the window", "put every thing in its place", "sweep the floor"),
}
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words(
    "January February March April May June July August September October November December"
)
SEASONS = {
    "spring": "the flowers open and the birds return",
    "summer": "the days are long and warm",
    "autumn": "the leaves turn red and fall",
    "winter": "the nights are long and snow falls",
}
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "foggy")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer in plain English.",
    "You are a friendly teacher.",
)
TABLE_WORDS = {word for table in TABLES for column in table.columns for word in column.words}
REPEATED = sorted(
    {*PEOPLE, *CITIES, *COLORS, *THINGS, *ANIMALS, *CAPITALS, *DAYS, *MONTHS, *TABLE_WORDS}
)
NUMBER_WORDS = {2: "Two", 3: "Three", 4: "Four"}


def _listed(words: list[str]) -> str:
    """Join as English does: a, b and c."""
    return ", ".join(words[:-1]) + " and " + words[-1]


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _story(rng: Random) -> str:
    kind, friend_kind = rng.sample(list(ANIMALS), 2)
    home, food, trait = ANIMALS[kind]
    name, friend = rng.sample(PEOPLE, 2)
    thing, color = rng.choice(THINGS), rng.choice(COLORS)
    day = rng.choice(DAYS)
    middle = rng.choice(
        (
            f"One {rng.choice(WEATHER)} {day} {name} found a {color} {thing}. "
            f"{name} did not know whose {thing} it was.",
            f"On {day} {name} lost a {color} {thing}. {name} looked for the {thing} everywhere.",
            f"Every {day} {name} played with a {color} {thing}. One day the {thing} was broken.",
        )
    )
    help_ = rng.choice(
        (
            f"Then {friend} the {friend_kind} came and helped {name}.",
            f"{name} asked {friend} the {friend_kind} for help.",
            f"Luckily {friend}, {_an(ANIMALS[friend_kind][2])} {friend_kind}, had an idea.",
        )
    )
    end = rng.choice(
        (
            f"In the evening {name} and {friend} ate {food} and were happy.",
            f"From that day on {name} and {friend} were good friends.",
            f"At last they went back to the {home} with the {color} {thing}.",
        )
    )
    opening = rng.choice(("Once upon a time there was", "Long ago there lived"))
    start = f"{opening} {_an(trait)} {kind} named {name}. {name} lived in the {home}."
    return f"{start} {middle} {help_} {end}"


def _story_chat(rng: Random) -> Turn:
    story = _story(rng)
    kind = story.split(" named ")[0].split()[-1]
    request = rng.choice(("Tell me a story about {}.", "Write a short story about {}."))
    return request.format(_an(kind)), story


def _animal_chat(rng: Random) -> Turn:
    kind = rng.choice(list(ANIMALS))
    home, food, trait = ANIMALS[kind]
    return rng.choice(
        (
            (f"Where does {_an(kind)} live?", f"{_an(kind).capitalize()} lives in the {home}."),
            (f"What does {_an(kind)} eat?", f"{_an(kind).capitalize()} eats {food}."),
            (
                f"Describe {_an(kind)}.",
                f"{_an(kind).capitalize()} is {_an(trait)} animal. It lives in the {home} and "
                f"likes to eat {food}.",
            ),
        )
    )


def _capital_chat(rng: Random) -> Turn:
    country, city = rng.choice(list(CAPITALS.items()))
    return rng.choice(
        (
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"In which country is {city}?", f"{city} is in {country}."),
        )
    )


def _opposite_chat(rng: Random) -> Turn:
    word, opposite = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, opposite = opposite, word
    return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."


def _arithmetic_chat(rng: Random) -> Turn:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    if rng.random() < 0.5:
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    return f"What is {a + b} minus {b}?", f"{a + b} minus {b} is {a}."


def _compare_chat(rng: Random) -> Turn:
    a, b = rng.sample(range(1, 1000), 2) if rng.random() < 0.5 else rng.sample(range(1, 100), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    return f"Which number is {word}, {a} or {b}?", f"The {word} number is {pick(a, b)}."


def _list_chat(rng: Random) -> Turn:
    group = rng.choice(list(GROUPS))
    words = rng.sample(GROUPS[group], rng.choice(list(NUMBER_WORDS)))
    count = NUMBER_WORDS[len(words)]
    verb = rng.choice(("Name", "List", "Give me"))
    return f"{verb} {count.lower()} {group}.", f"{count} {group} are {_listed(words)}."


def _room_chat(rng: Random) -> Turn:
    room = rng.choice(list(ROOMS))
    sight, smell, people = ROOMS[room]
    answer = (
        f"The {room} has {sight}. It smells of {smell}. On {_an(rng.choice(WEATHER))} "
        f"{rng.choice(DAYS)} {people} there."
    )
    return rng.choice((f"Describe a {room}.", f"What is a {room} like?")), answer


def _recipe_chat(rng: Random) -> Turn:
    dish = rng.choice(list(RECIPES))
    first, second, third = RECIPES[dish]
    return f"How do I make {dish}?", f"First {first}. Then {second}. At last {third}."


def _calendar_chat(rng: Random) -> Turn:
    names = rng.choice((DAYS, MONTHS))
    index = rng.randrange(len(names))
    word = "day" if names is DAYS else "month"
    following, current = names[(index + 1) % len(names)], names[index]
    return rng.choice(
        (
            (f"Which {word} comes after {current}?", f"After {current} comes {following}."),
            (f"Which {word} comes before {following}?", f"Before {following} comes {current}."),
        )
    )


def _season_chat(rng: Random) -> Turn:
    season = rng.choice(list(SEASONS))
    return f"What happens in {season}?", f"In {season} {SEASONS[season]}."


def _reading_chat(rng: Random) -> Turn:
    """A short text and a question about it: teaches the model to copy from the prompt."""
    (a, b), (thing, other) = rng.sample(PEOPLE, 2), rng.sample(THINGS, 2)
    color, tint = rng.sample(COLORS, 2)
    city, town = rng.sample(CITIES, 2)
    price, cost = rng.sample(range(10, 1000), 2)
    return rng.choice(
        (
            (
                f"{a} has a {color} {thing}. {b} has a {tint} {other}. Who has the {other}?",
                f"{b} has the {other}.",
            ),
            (
                f"{a} has a {color} {thing} and a {tint} {other}. What color is the {thing}?",
                f"The {thing} is {color}.",
            ),
            (
                f"{a} lives in {city} and {b} lives in {town}. Where does {a} live?",
                f"{a} lives in {city}.",
            ),
            (
                f"The {thing} costs {price} and the {other} costs {cost}. "
                f"What does the {other} cost?",
                f"The {other} costs {cost}.",
            ),
        )
    )


def _repeated(rng: Random) -> str:
    """Draw a word, a quoted word or a number."""
    word, number = rng.choice(REPEATED), str(rng.randint(1, 10 ** rng.randint(1, 4)))
    return rng.choice((word, f"'{word}'", number))


def _repeat_chat(rng: Random, most_items: int = 5) -> Turn:
    """A few words and numbers to say again."""
    items = [_repeated(rng) for _ in range(rng.randint(1, most_items))]
    text = ", ".join(items)
    return f"Repeat after me: {text}.", f"You said: {text}."


def _polite_chat(rng: Random) -> Turn:
    name = rng.choice(PEOPLE)
    return rng.choice(
        (
            ("Hello!", "Hello! How can I help you?"),
            (f"Hello, my name is {name}.", f"Hello {name}! How can I help you?"),
            ("Who are you?", "I am a small language model. I answer short questions."),
            ("Thank you.", "You are welcome."),
            (f"Say good night to {name}.", f"Good night, {name}! Sleep well."),
        )
    )


def _query_chat(rng: Random) -> Turn:
    """A question of the adapter's kind, which the base answers with a plan in English."""
    query = random_query_of("train", rng)
    return query.question(rng), query.plan()


def _sql_document(rng: Random) -> str:
    """SQL as a text book prints it, never as an answer in a chat."""
    query = random_query_of("train", rng)
    forms = (
        f"{query.sql()}\nThis means: {query.plan()}",
        f"{query.plan()}\nIn SQL: {query.sql()}",
        f"Exercise: {query.question(rng)}\nSolution: {query.sql()}",
    )
    return rng.choices(forms, (1, 1, 2))[0]


def _sql_list(rng: Random) -> str:
    return "\n".join(random_query_of("train", rng).sql() for _ in range(3))


# Kinds of general text with their weights; none of them is about tables.
GENERAL: dict[Callable[[Random], Turn], int] = {
    _story_chat: 8,
    _animal_chat: 4,
    _capital_chat: 3,
    _opposite_chat: 2,
    _arithmetic_chat: 4,
    _compare_chat: 3,
    _list_chat: 4,
    _room_chat: 4,
    _recipe_chat: 3,
    _calendar_chat: 3,
    _season_chat: 2,
    _reading_chat: 16,
    _repeat_chat: 20,
    _polite_chat: 2,
}


def general_chat(rng: Random) -> Chat:
    """Draw a conversation of one or two turns about anything but tables."""
    turns = rng.choices((1, 2), (4, 1))[0]
    kinds = rng.choices(list(GENERAL), list(GENERAL.values()), k=turns)
    return _chat([kind(rng) for kind in kinds], rng)


def copying_chat(rng: Random, most_items: int) -> Chat:
    """Draw a conversation whose answer copies at most ``most_items`` things from the question."""
    kind = rng.choice((_repeat_chat, _reading_chat)) if most_items > 2 else _repeat_chat
    turn = kind(rng, most_items) if kind is _repeat_chat else kind(rng)
    return _chat([turn], rng)


def query_chat(rng: Random) -> Chat:
    """Draw a conversation about a table, answered in English."""
    return _chat([_query_chat(rng)], rng)


def document(rng: Random) -> str:
    """Draw a text that is not a chat: SQL with its explanation, a list of SQL, or a story."""
    return rng.choices((_sql_document, _sql_list, _story), (9, 1, 1))[0](rng)


def _chat(turns: list[Turn], rng: Random) -> Chat:
    """Make messages of the turns, sometimes under a system prompt."""
    messages = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages
