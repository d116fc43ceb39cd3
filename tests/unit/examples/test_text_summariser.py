"""What the text summariser reads, ranks and chooses."""

import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.examples.deployment import EXAMPLES, Context, check_report, load_agent

TEXT = (EXAMPLES / "data" / "watermills.txt").read_text(encoding="utf-8")
summariser = load_agent("text_summariser")


async def summarise(text: str, **options: Any) -> dict[str, Any]:
    report = await summariser.Agent().execute({"text": text, **options}, Context())
    check_report(report)
    return dict(report)


async def split(text: str) -> list[str]:
    sentences: list[str] = await summariser.read_sentences(text, Context())
    return sentences


# -- the sample ---------------------------------------------------------------------------------------------------


async def test_sample_is_summarised_by_what_it_is_about():
    """Five sentences of the sample, word for word and in its order, and its subject among the keywords."""
    report = await summarise(TEXT)
    flat = " ".join(TEXT.split())
    places = [flat.index(sentence["text"]) for sentence in report["sentences"]]
    assert len(places) == 5
    assert places == sorted(places)
    assert report["extract"] == " ".join(sentence["text"] for sentence in report["sentences"])
    assert {"water", "wheel", "headrace", "mill"} <= {keyword["word"] for keyword in report["keywords"]}
    assert report["words_total"] == len(TEXT.split())
    assert dict(report["summary"])["Keywords"] == ", ".join(keyword["word"] for keyword in report["keywords"])


async def test_sample_is_cut_into_its_sentences():
    """Names, years and abbreviations in the sample end no sentence; headings stand alone."""
    sentences = await split(TEXT)
    assert sentences[0] == "Water on a Wheel"
    assert "The headrace" in sentences
    assert any("wrote that he had seen" in text and text.startswith("In 1753 Mr. J. Smeaton") for text in sentences)
    assert any("cubic metres, i.e. enough to drive" in text for text in sentences)
    assert any("In 1827 B. Fourneyron put" in text for text in sentences)
    assert all(text[0].isupper() for text in sentences)


@pytest.mark.parametrize("wanted", [1, 3, 20, 100])
async def test_number_of_sentences_is_kept(wanted):
    """As many sentences as were asked for, or all that are worth it; more sentences contain the fewer."""
    found = {item["position"] for item in (await summarise(TEXT, sentences=wanted))["sentences"]}
    fewer = {item["position"] for item in (await summarise(TEXT, sentences=1))["sentences"]}
    assert len(found) == min(wanted, len(found))
    assert len(found) == wanted or wanted == 100
    assert fewer <= found


def test_summary_does_not_depend_on_the_seed_of_hashes():
    """Two processes with different hash seeds print the same summary."""
    program = (
        "import asyncio, json, sys; sys.path.insert(0, '.')\n"
        "from tests.unit.examples.test_text_summariser import TEXT, summarise\n"
        "print(json.dumps(asyncio.run(summarise(TEXT, sentences=9))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=EXAMPLES.parent,
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# -- the method ---------------------------------------------------------------------------------------------------


def textbook_scores(vectors: list[dict[str, float]]) -> list[float]:
    """LexRank as it stands in the paper: the whole table of likenesses, and two hundred steps of PageRank."""
    count = len(vectors)
    table = [
        [
            0.0 if i == j else sum(weight * two.get(word, 0.0) for word, weight in one.items())
            for j, two in enumerate(vectors)
        ]
        for i, one in enumerate(vectors)
    ]
    ranks = [1 / count] * count
    for _ in range(200):
        arrived = [0.15 / count] * count
        for i, row in enumerate(table):
            total = sum(row)
            for j, value in enumerate(row):
                arrived[j] += 0.85 * ranks[i] * (value / total if total > 1e-9 else 1 / count)
        ranks = arrived
    return [rank * count for rank in ranks]


@pytest.mark.parametrize(
    "text", [TEXT, "Cats purr. Dogs bark. Cats and dogs sleep.\n\nFish!", "One alone. Two apart. 3."]
)
async def test_scores_are_those_of_the_textbook(text):
    """Walking through the words gives the scores that the full table of likenesses gives."""
    vectors = await summariser.weigh(await split(text))
    scores = await summariser.wander(vectors, Context())
    assert scores == pytest.approx(textbook_scores(vectors), abs=1e-4)
    assert sum(scores) == pytest.approx(len(scores))


async def test_vectors_have_length_one():
    """A sentence weighs as much as any other, however long it is."""
    for vector in await summariser.weigh(await split(TEXT)):
        assert not vector or math.isclose(sum(weight**2 for weight in vector.values()), 1.0)


async def test_central_sentence_wins_over_the_odd_one():
    """The sentence that shares its words with the others is chosen, the one about something else is not."""
    text = (
        "The mill needs a river, a weir and a pond. The weir of the mill lifts the river into a pond above. "
        "Below the pond the mill returns its river. My aunt in Lisbon collects very old and valuable stamps."
    )
    chosen = [item["text"] for item in (await summarise(text, sentences=1))["sentences"]]
    assert "weir" in chosen[0]


async def test_nothing_is_said_twice():
    """A sentence that is repeated, or nearly, is chosen once."""
    repeated = "The old headrace carries cold water slowly towards the wheel."
    text = f"{repeated} {repeated} {repeated[:-1]} again. A weir upstream lifts the river by about one metre. " * 3
    report = await summarise(text, sentences=10)
    assert sum("headrace carries" in item["text"] for item in report["sentences"]) == 1
    assert len(report["sentences"]) == 2


async def test_headings_and_remarks_are_not_chosen():
    """What has no full stop, or hardly a word in it, is no summary while there is anything better."""
    text = (
        "Everything about water and wheels\n\nWater turns wheels. The wheel of a water mill turns slowly under water."
    )
    chosen = [item["text"] for item in (await summarise(text, sentences=2))["sentences"]]
    assert chosen == ["The wheel of a water mill turns slowly under water."]


@pytest.mark.parametrize("text", ["Hello", "the of and", "42", "Hi! You? Me.", "Ça va?"])
async def test_text_without_a_real_sentence_is_returned_as_it_is(text):
    """Where nothing better is there, scraps are the summary."""
    assert (await summarise(text))["extract"] == text


# -- sentences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentences",
    [
        ["He came.", "She went."],
        ["Dr. Smith met Prof. Will Jones of St. Ives.", "They talked."],
        ["J. R. Smeaton and B. Fourneyron built mills, e.g. Carville."],
        ["The U.S. Army stayed.", "We left the U.S.", "The rest is history."],
        ["It costs 3.50 in total.", "Version 2.0 costs more."],
        ["In 1827.", "Fourneyron won."],
        ["See Fig. 5 and vol. 2, p. 7, of Jones et al. for more."],
        ["Wheels, weirs, etc. are old.", "Turbines, pumps, etc.", "They are new."],
        ["Why?", "Nobody knows!", "Really…", "So be it..."],
        ['"Stop!" he cried.', '"Why?" she asked.'],
        ["He said: “Go.”", "She went (slowly.)", "It was late."],
        ["The firm is Mill Inc. and it grinds.", "It was no.", "No. 7 was closed."],
        ["3. The third wheel turned."],
        ["approx. five of them", "A new paragraph"],
    ],
)
async def test_sentences_end_where_they_end(sentences):
    """Titles, initials, abbreviations, numbers, quotations and ellipses are told from ends of sentences."""
    separator = "\n\n" if sentences[0].startswith("approx") else " "
    assert await split(separator.join(sentences)) == sentences


async def test_paragraphs_end_sentences_and_lines_do_not():
    """A blank line ends a sentence, whatever it looks like; a line end within a paragraph is a space."""
    assert await split("A heading\n\nOne sentence\nover two lines. Another\r\n\r\none") == [
        "A heading",
        "One sentence over two lines.",
        "Another",
        "one",
    ]


async def test_text_without_full_stops_is_cut():
    """A sentence has at most 1,000 characters, so that no text is one endless sentence."""
    sentences = await split("word " * 1_000 + "x" * 5_000)
    assert max(map(len, sentences)) == 1_000
    assert len(sentences) == 6


async def test_too_long_a_text_is_refused():
    """Ten thousand sentences are the limit; the error counts and says what to do."""
    with pytest.raises(ValueError, match=r"12,000 sentences, but may have 10,000: send its chapters singly\.$"):
        await summarise("One more. " * 12_000)


@pytest.mark.parametrize("text", ["", " \n\n ", "\0\x1b\u200b"])
async def test_text_without_a_word_is_refused(text):
    """Of nothing there is no summary."""
    with pytest.raises(ValueError, match=r"^`text` is .*, which has no word in it: send "):
        await summarise(text)


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("mills", "mill"),
        ("batteries", "battery"),
        ("wheel", "wheel"),
        ("glass", "glass"),
        ("bus", "bus"),
        ("races", "race"),
        ("shoes", "shoe"),
        ("eyries", "eyry"),
    ],
)
def test_plurals_are_folded(word, stem):
    """The S-stemmer folds plurals and leaves other words that end in s."""
    assert summariser.singular(word) == stem


def test_words_without_meaning_are_left_out():
    """Stop words, numbers and single letters say nothing; a word is known by its stem."""
    found = list(summariser.terms("This is his; it was the mill's 3rd, and Wheels x-axes turn."))
    assert found == [("mill", "mill"), ("wheel", "Wheels"), ("axe", "axes"), ("turn", "turn")]


async def test_keyword_has_its_most_frequent_form():
    """Keywords are shown as the text writes them, whatever their stem is."""
    report = await summarise("Batteries power Wheels. Batteries last. A battery fails. Wheels turn. Wheels fail.")
    assert {"Batteries", "Wheels"} <= {keyword["word"] for keyword in report["keywords"]}
    assert report["keywords"][0]["score"] == 1.0


# -- properties ---------------------------------------------------------------------------------------------------

prose = st.lists(
    st.sampled_from(
        [
            "the",
            "mill",
            "wheel",
            "River",
            "weir",
            "Dr.",
            "e.g.",
            "3.5",
            "and?",
            "stop!",
            "“yes.”",
            "etc.",
            "J.",
            "\n\n",
        ]
    ),
    max_size=200,
).map(" ".join)


@given(text=st.one_of(prose, st.text(max_size=600)), wanted=st.integers(1, 8))
@example(text="a" * 20_000 + "\n" + "b. " * 5_000, wanted=3)
@settings(max_examples=200)
async def test_summary_is_a_part_of_the_text_in_its_order(text, wanted):
    """The chosen sentences are sentences of the text, each once, in order, and at most as many as asked for."""
    sentences = await split(text)
    if not sentences:
        with pytest.raises(ValueError, match="no word in it"):
            await summarise(text, sentences=wanted)
        return
    chosen = (await summarise(text, sentences=wanted))["sentences"]
    positions = [item["position"] for item in chosen]
    assert 1 <= len(chosen) <= wanted
    assert positions == sorted(set(positions))
    assert [item["text"] for item in chosen] == [sentences[position - 1] for position in positions]


@given(text=st.one_of(prose, st.text(max_size=600)))
@settings(max_examples=200)
async def test_sentences_are_the_whole_text(text):
    """Cutting into sentences loses no word and adds none; only white space and what cannot be shown goes."""
    words = ["".join(character for character in word if character.isprintable()) for word in text.split()]
    assert " ".join(await split(text)) == " ".join(word for word in words if word)


@given(st.lists(st.sampled_from(["mill", "wheel", "weir", "pond"]), min_size=1, max_size=40))
@settings(max_examples=50)
async def test_keywords_are_words_of_the_text(words):
    """Every keyword stands in the text, and there are at most ten."""
    report = await summarise(" ".join(words).capitalize() + ".")
    counted = Counter(word.lower() for word in words)
    assert {keyword["word"].lower() for keyword in report["keywords"]} <= counted.keys()
    assert 1 <= len(report["keywords"]) <= 10
