"""An agent that shortens a text to its most central sentences, word for word and in their order.

    headrace agents run text_summariser --file text=examples/data/watermills.txt

Method: continuous LexRank [1], that is, TextRank [2] with the cosine of TF-IDF vectors as the likeness of sentences.
Intuition: a reader wanders through the text, picks a word of the sentence, goes on to another sentence that has this
word too, and now and then jumps anywhere. The sentences where most of the time is spent say what the text is about,
and the words that are passed most are its keywords. The same text always gives the same summary.

The table of all likenesses, which grows with the square of the text, is never built: a step of the walk goes from the
sentences to their words and back, so its cost grows with the text only.

Made for English: a small list of stop words, plurals folded by the S-stemmer [3], abbreviations told from ends of
sentences by a list and by what follows. Headings and short remarks are read, but not chosen.

[1] Erkan and Radev, LexRank: Graph-based Lexical Centrality as Salience in Text Summarization, 2004.
[2] Mihalcea and Tarau, TextRank: Bringing Order into Texts, 2004.
[3] Harman, How Effective Is Suffixing?, 1991.
"""

import asyncio
import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from reprlib import repr as short
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")

SENTENCES_MAX = 10_000
"""A long novel; a summary of more than that says nothing."""

PIECE_CHARACTERS_MAX = 8_192
"""The event loop gets a turn after this much text is read: about two milliseconds of work."""

TURN_SENTENCES = 10
TURN_ITEMS = 2_000
"""The event loop gets a turn after this many sentences, or entries of a long list."""

SENTENCE_CHARACTERS_MAX = 1_000
"""A longer sentence is cut, so that a text without full stops is not one sentence without end."""

TERMS_MIN = 5
"""A sentence with fewer words that carry meaning is rarely a summary, yet the cosine favours just these."""

DAMPING = 0.85
"""How often the reader follows a word rather than jumping anywhere; the value of both papers."""

STEPS_MAX = 60
CHANGE_MAX = 1e-6
"""The walk has settled when a step moves less than this share of the time."""

LIKENESS_MAX = 0.7
"""A sentence more like a chosen one than this (cosine) would say the same again."""

LOOKAHEAD = 10
"""How many sentences are considered for each one that is asked for."""

KEYWORDS_MAX = 10

TITLES = frozenset(re.findall(r"\w+", "capt col dr fr gen gov hon lt messrs mr mrs ms mt prof rep rev sen sgt st"))
"""Abbreviations that a name follows, so that they never end a sentence."""

ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        """
        al approx apr aug ave bros ca cf ch co corp dec dept ed eds eq est etc feb fig figs inc jan jr jul jun ltd mar
        max min nov no nos oct op p pp pt resp sec sect sep sept viz vol vols vs
        """,
    )
)
"""Abbreviations that may end a sentence: they do when a word such as The or It follows."""

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above after again against all almost also although always am among an and another any are around as at
        away be became because become been before being below between both but by can cannot come comes could did do
        does doing done down during each either else enough even ever every few first for from further get gets give
        gives go goes going gone got had has have having he her here hers herself him himself his how however i if in
        into is it its itself just kept last later least less let like little long made make makes many may me might
        more most much must my myself near neither never no nor not nothing now of off often on once one only onto or
        other others our ours out over own per perhaps put quite rather said same say says second see seem several
        shall she should since small so some soon still such take takes ten than that the their theirs them themselves
        then there therefore these they thing this those though three through thus to together too toward two under
        until up upon us use used very was way we well went were what when where whether which while who whole whom
        whose why will with within without would yet you your yours
        """,
    )
)

# Typographic quotation marks by their names: in most fonts they cannot be told apart.
OPENING = "\"'([{«\N{LEFT DOUBLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}"
CLOSING = "\"')]}»\N{RIGHT DOUBLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
TERM = re.compile(rf"\b[^\W\d_]{{2,}}(?:['{APOSTROPHE}][^\W\d_]+)*")


class Context(Protocol):
    """What this agent uses of the context that the host gives to every execution."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Tell whoever watches how far the work is."""


class Agent:
    """Summarises a text by its own most central sentences."""

    def get_capabilities(self) -> dict[str, Any]:
        """What the agent does, what it takes (a JSON schema) and what it returns."""
        return {
            "name": "text_summariser",
            "description": "Shortens an English text to its most central sentences and finds its keywords.",
            "input": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "Plain text; a blank line ends a paragraph."},
                    "sentences": {"type": "integer", "minimum": 1, "maximum": 100, "default": 5},
                },
                "required": ["text"],
                "additionalProperties": False,
            },
            "output": "title, summary and tables to show; extract (the summary as text), sentences (position, score, "
            "text), keywords, sentences_total and words_total to compute with. The average sentence scores 1.",
        }

    async def execute(self, input: dict[str, Any], context: Context) -> dict[str, Any]:
        """Summarise `input["text"]`; raise ValueError when the input does not follow the schema or holds no word."""
        text, wanted = read_input(input)
        sentences = await read_sentences(text, context)
        if not sentences:
            raise ValueError(f"`text` is {short(text)}, which has no word in it: send some sentences.")
        if len(sentences) > SENTENCES_MAX:
            raise ValueError(
                f"`text` has {len(sentences):,} sentences, but may have {SENTENCES_MAX:,}: send its chapters singly."
            )
        vectors = await weigh(sentences)
        scores = await wander(vectors, context)
        chosen = await choose(sentences, vectors, scores, wanted)
        facts = {
            "extract": " ".join(sentences[position] for position in chosen),
            "sentences": [
                {"position": position + 1, "score": round(scores[position], 3), "text": sentences[position]}
                for position in chosen
            ],
            "keywords": await keywords(sentences, vectors, scores),
            "sentences_total": len(sentences),
            "words_total": sum(sentence.count(" ") + 1 for sentence in sentences),
        }
        return {"title": "Summary", "summary": summary(facts), "tables": tables(facts), **facts}


def read_input(input: Any) -> tuple[str, int]:
    """The text and the number of sentences to keep, checked."""
    if type(input) is not dict:
        raise ValueError(f"The input is {short(input)}, but must be an object: send {{'text': '...'}}.")
    unknown = sorted(set(input) - {"text", "sentences"})
    if unknown:
        raise ValueError(f"The input has the key {short(unknown[0])}; only `text` and `sentences` exist: remove it.")
    text = input.get("text")
    if type(text) is not str:
        raise ValueError(f"`text` is {short(text)}, but must be text: send the content of the file.")
    wanted = input.get("sentences", 5)
    if type(wanted) is not int or not 1 <= wanted <= 100:
        raise ValueError(
            f"`sentences` is {short(wanted)}, but must be an integer from 1 to 100: send 5, or leave it out."
        )
    return text, wanted


# -- from a text to sentences -------------------------------------------------------------------------------------


def pieces(text: str) -> Iterator[tuple[str, int]]:
    """The lines of a text, each with the position after it; a line too long for one turn is cut at a space."""
    start = 0
    while start < len(text):
        end = text.find("\n", start, start + PIECE_CHARACTERS_MAX)
        if end < 0:
            end = min(start + PIECE_CHARACTERS_MAX, len(text))
            space = text.rfind(" ", start, end)
            end = space if space > start and end < len(text) else end
        yield text[start:end], end
        start = end + 1 if text[end : end + 1] in {"\n", " "} else end


async def read_sentences(text: str, context: Context) -> list[str]:
    """The sentences, with single spaces between words, and without what cannot be shown."""
    sentences: list[str] = []
    sentence: list[str] = []
    characters = 0
    next_turn = PIECE_CHARACTERS_MAX
    for piece, position in pieces(text):
        words = [shown for word in piece.split() if (shown := visible(word))]
        for word in words or [""]:  # a blank line ends the sentence, as the empty word does
            too_long = characters + len(word) > SENTENCE_CHARACTERS_MAX
            if sentence and (not word or too_long or ends_sentence(sentence, word)):
                sentences.append(" ".join(sentence))
                sentence, characters = [], 0
            if word:
                sentence.append(word)
                characters += len(word) + 1
        if position >= next_turn:
            next_turn = position + PIECE_CHARACTERS_MAX
            context.progress(50 * position // len(text), 100, "reading")
            await asyncio.sleep(0)
    return [*sentences, " ".join(sentence)] if sentence else sentences


def visible(word: str) -> str:
    """The word without control characters, and of bounded length."""
    word = word[:SENTENCE_CHARACTERS_MAX]
    return word if word.isprintable() else "".join(character for character in word if character.isprintable())


def ends_sentence(sentence: list[str], next_word: str) -> bool:
    """Whether the last word of `sentence` ends it, given the word that follows."""
    word = sentence[-1].rstrip(CLOSING)
    if not word.endswith((".", "!", "?", "…")):
        return False
    start = next_word.lstrip(OPENING)
    if start[:1].islower():
        return False
    stem = word.rstrip(".").lstrip(OPENING).lower()
    if stem in TITLES or (len(sentence) == 1 and stem.isdigit()):  # Dr. Smith; 3. The wheel
        return False
    is_initials = word.endswith(".") and all(len(part) == 1 and part.isalpha() for part in stem.split("."))
    if stem in ABBREVIATIONS or is_initials:  # J. Smeaton; the U.S. Army; but: in the U.S. The
        return start.lower().rstrip(".,;:!?") in STOP_WORDS
    return True


# -- from sentences to scores -------------------------------------------------------------------------------------

Vector = dict[str, float]
"""The words of a sentence by their weight; the squares of the weights add up to 1."""


def terms(sentence: str) -> Iterator[tuple[str, str]]:
    """The words that carry meaning, each as its stem and as it stands."""
    for match in TERM.finditer(sentence):
        word = match[0].replace(APOSTROPHE, "'").removesuffix("'s")
        stem = singular(word.lower())
        if stem not in STOP_WORDS and word.lower() not in STOP_WORDS:
            yield stem, word


def singular(word: str) -> str:
    """The S-stemmer: mills to mill, batteries to battery; glass and bus stay."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


async def weigh(sentences: list[str]) -> list[Vector]:
    """A TF-IDF vector for each sentence: a word weighs more the rarer it is in the text."""
    counts: list[Counter[str]] = []
    sentences_with: Counter[str] = Counter()
    for sentence in sentences:
        count = Counter(stem for stem, _ in terms(sentence))
        counts.append(count)
        sentences_with.update(count.keys())
        await turn(len(counts))
    vectors: list[Vector] = []
    for count in counts:
        weights = {word: n * math.log(1 + len(sentences) / sentences_with[word]) for word, n in count.items()}
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        vectors.append({word: weight / length for word, weight in weights.items()})
        await turn(len(vectors))
    return vectors


async def wander(vectors: list[Vector], context: Context) -> list[float]:
    """Where the reader spends the time, as multiples of the average sentence."""
    count = len(vectors)
    likeness = [max(total, 0.0) for total in await pass_on(vectors, [1.0] * count)]
    connected = [total > 1e-9 for total in likeness]
    # Without jumps, the time would be spent in proportion to the likeness: so this start is nearly the goal.
    whole = sum(likeness)
    scores = [total / whole * count for total in likeness] if whole > 1e-9 else [1.0] * count
    for step in range(STEPS_MAX):
        context.progress(60 + 40 * step // STEPS_MAX, 100, "ranking")
        shares = [
            score / total if joined else 0.0 for score, total, joined in zip(scores, likeness, connected, strict=True)
        ]
        lost = sum(score for score, joined in zip(scores, connected, strict=True) if not joined)
        walked = await pass_on(vectors, shares)
        jumped = 1 - DAMPING + DAMPING * lost / count
        before, scores = scores, [jumped + DAMPING * amount for amount in walked]
        change = sum(abs(now - then) for now, then in zip(scores, before, strict=True))
        if change < CHANGE_MAX * count:
            break
    return scores


async def pass_on(vectors: list[Vector], amounts: list[float]) -> list[float]:
    """What each sentence gets when each gives its amount to all others, multiplied by their likeness.

    The likeness of two sentences is the sum, over their common words, of weight x weight. So what a sentence gives can
    be put down at its words, where the others pick it up; what it picks up of its own is taken off again.
    """
    at_words: dict[str, float] = {}
    for index, (vector, amount) in enumerate(zip(vectors, amounts, strict=True)):
        for word, weight in vector.items():
            at_words[word] = at_words.get(word, 0.0) + weight * amount
        await turn(index)
    received: list[float] = []
    for vector, amount in zip(vectors, amounts, strict=True):
        received.append(sum(weight * at_words[word] for word, weight in vector.items()) - amount)
        await turn(len(received))
    return received


# -- the choice ---------------------------------------------------------------------------------------------------


async def choose(sentences: list[str], vectors: list[Vector], scores: list[float], wanted: int) -> list[int]:
    """The positions of the best sentences, in the order of the text; none that says again what another says."""
    positions: dict[str, int] = {}
    candidates: list[int] = []
    for position, sentence in enumerate(sentences):
        if positions.setdefault(sentence, position) == position and is_telling(sentence, vectors[position]):
            candidates.append(position)
        await turn(position)
    candidates = candidates or list(positions.values())
    chosen: list[int] = []
    for number, position in enumerate(await largest(candidates, wanted * LOOKAHEAD, key=scores.__getitem__)):
        if all(likeness(vectors[position], vectors[other]) <= LIKENESS_MAX for other in chosen):
            chosen.append(position)
        if len(chosen) == wanted:
            break
        await turn(number)
    return sorted(chosen)


def is_telling(sentence: str, vector: Vector) -> bool:
    """Whether this is a sentence with something in it, rather than a heading or a remark."""
    return len(vector) >= TERMS_MIN and sentence.rstrip(CLOSING).endswith((".", "!", "?", "…"))


def likeness(one: Vector, other: Vector) -> float:
    """The cosine of two vectors."""
    return sum(weight * other[word] for word, weight in one.items() if word in other)


async def keywords(sentences: list[str], vectors: list[Vector], scores: list[float]) -> list[dict[str, Any]]:
    """The words that the reader passes most; 1 is the first of them. Each in its most frequent form."""
    passed: dict[str, float] = {}
    for index, (vector, score) in enumerate(zip(vectors, scores, strict=True)):
        for word, weight in vector.items():
            passed[word] = passed.get(word, 0.0) + weight * score
        await turn(index)
    best = dict(await largest(passed.items(), KEYWORDS_MAX, key=lambda item: item[1]))
    forms: dict[str, Counter[str]] = {stem: Counter() for stem in best}
    for index, sentence in enumerate(sentences):
        for stem, word in terms(sentence):
            if stem in forms:
                forms[stem][word] += 1
        await turn(index)
    return [
        {"word": forms[stem].most_common(1)[0][0], "score": round(score / max(best.values()), 3)}
        for stem, score in best.items()
    ]


async def turn(index: int) -> None:
    """Give the event loop a turn, every few sentences."""
    if index % TURN_SENTENCES == 0:
        await asyncio.sleep(0)


async def largest(items: Iterable[Item], count: int, key: Callable[[Item], Any]) -> list[Item]:
    """The `count` largest items, largest first and the earlier first among equals; the event loop gets its turns."""
    best: list[Item] = []
    rest = iter(items)
    while batch := list(islice(rest, TURN_ITEMS)):
        best = heapq.nlargest(count, best + batch, key=key)
        await asyncio.sleep(0)
    return best


# -- the report ---------------------------------------------------------------------------------------------------


def summary(facts: dict[str, Any]) -> list[list[Any]]:
    """The figures that one wants to see first."""
    kept = facts["extract"].count(" ") + 1
    return [
        ["Sentences", facts["sentences_total"]],
        ["Words", facts["words_total"]],
        ["Kept", f"{len(facts['sentences'])} sentences, {kept / facts['words_total']:.0%} of the words"],
        ["Keywords", ", ".join(keyword["word"] for keyword in facts["keywords"]) or "none"],
    ]


def tables(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The chosen sentences and the keywords; empty tables are left out."""
    lists = {"Sentences": facts["sentences"], "Keywords": facts["keywords"]}
    return [
        {"title": title, "columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
        for title, rows in lists.items()
        if rows
    ]
