"""What holds for all three sample agents."""

import ast
import random
import sys
from typing import Any

import pytest

from tests.unit.examples.deployment import EXAMPLES, Context, check_report, load_agent, report_or_error, turns_during

NAMES = ("log_analyst", "csv_profiler", "text_summariser")
TEXT_KEYS = {"log_analyst": "log", "csv_profiler": "csv", "text_summariser": "text"}
SAMPLES = {"log_analyst": "access.log", "csv_profiler": "orders.csv", "text_summariser": "watermills.txt"}

JUNK = random.Random(7).randbytes(20_000)
HOSTILE = {
    "empty": "",
    "blank": " \n\t\r\n  \n",
    "one huge line": "x" * 3_000_000,
    "huge line of words": "water mill " * 100_000,
    "huge line of cells": "1,2;3\t4|5 " * 100_000,
    "line ends only": "\n" * 20_000,
    "carriage returns only": "a,b\r1,2\r3,4\r",
    "mixed line ends": "a,b\r\n1,2\n3,4\r5,6\n",
    "binary": JUNK.decode("latin-1"),
    "binary, decoded with loss": JUNK.decode("utf-8", "replace"),
    "binary, smuggled through": JUNK.decode("utf-8", "surrogateescape"),
    "zeros": "\0" * 1_000 + "\n" + "a\0b,c\0d\n" * 50,
    "terminal commands": "\x1b[2J\x1b]0;owned\x07,b\n" + "\x1b[31mred alert. Run for it now!\x1b[0m,2\n" * 30,
    "scripts and emoji": "ภาษาไทย,日本語,🧑\u200d🚀\n\u202eesrever,水車は回る。,👩\u200d👧 ok\n" * 20,
    "line separators": "a,b\u2028c\x85d\x0be\n" * 20,
    "open quotation mark": 'a,b\n"' + "1,2\n" * 1_000,
    "many brackets": "[(" * 10_000 + "\n" + '"' * 9_999,
    "many full stops": "." * 50_000 + " " + ". " * 20_000,
    "many digits": "9" * 100_000 + "\n" + "1" + ",1" * 20_000 + "x",
}


def sample(name: str) -> str:
    return (EXAMPLES / "data" / SAMPLES[name]).read_bytes().decode()


@pytest.mark.parametrize("name", NAMES)
def test_source_needs_nothing_but_the_standard_library(name):
    """An agent is one file that runs wherever Python does."""
    tree = ast.parse((EXAMPLES / "agents" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", NAMES)
def test_capabilities_describe_the_input_that_is_taken(name):
    """get_capabilities names the agent, describes it, and gives a JSON schema that the sample satisfies."""
    capabilities = load_agent(name).Agent().get_capabilities()
    assert set(capabilities) == {"name", "description", "input", "output"}
    assert capabilities["name"] == name
    assert capabilities["input"]["required"] == [TEXT_KEYS[name]]
    assert capabilities["input"]["additionalProperties"] is False
    assert TEXT_KEYS[name] in capabilities["input"]["properties"]
    for schema in capabilities["input"]["properties"].values():
        assert schema["type"] in {"string", "integer"}
        assert schema.get("minimum", 1) == 1
        assert schema.get("maximum", 100) == 100


@pytest.mark.parametrize("name", NAMES)
async def test_sample_gives_a_report(name):
    """Each agent turns the file that comes with it into a report that can be shown."""
    report = await load_agent(name).Agent().execute({TEXT_KEYS[name]: sample(name)}, Context())
    check_report(report)
    assert len(report["tables"]) >= 2


@pytest.mark.parametrize("name", NAMES)
async def test_same_input_gives_the_same_report(name):
    """Nothing of one execution is left for the next, not even on the same instance."""
    agent = load_agent(name).Agent()
    first = await agent.execute({TEXT_KEYS[name]: sample(name)}, Context())
    await agent.execute({TEXT_KEYS[name]: "time,path\nSomething else entirely. It happened.\n"}, Context())
    assert await agent.execute({TEXT_KEYS[name]: sample(name)}, Context()) == first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_text_gives_a_report_or_a_sentence(name, kind):
    """Whatever is sent, the answer is a report that can be shown, or an error that says what to do."""
    result = await report_or_error(load_agent(name), {TEXT_KEYS[name]: HOSTILE[kind]})
    if isinstance(result, str):
        assert result.isprintable()
        assert result.endswith(".")
        assert ": " in result
        assert len(result) < 400
    else:
        check_report(result)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (None, "None"),
        (["a", "b"], "['a', 'b']"),
        ({}, "None"),
        ({"TEXT": 17}, "17"),
        ({"TEXT": None}, "None"),
        ({"TEXT": ["a"] * 100_000}, "['a', 'a'"),
        ({"TEXT": "a b c", "colour": "red"}, "'colour'"),
    ],
)
async def test_wrong_input_is_refused_by_name(name, change, named):
    """The error quotes the value, says what it must be and what to do."""
    input: Any = (
        {TEXT_KEYS[name] if key == "TEXT" else key: value for key, value in change.items()}
        if (isinstance(change, dict))
        else change
    )
    with pytest.raises(ValueError, match=r"(must be|only).*: (send|remove)") as caught:
        await load_agent(name).Agent().execute(input, Context())
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("log_analyst", "top", 0),
        ("log_analyst", "top", 101),
        ("log_analyst", "top", True),
        ("log_analyst", "top", "ten"),
        ("log_analyst", "top", None),
        ("csv_profiler", "delimiter", ""),
        ("csv_profiler", "delimiter", "::"),
        ("csv_profiler", "delimiter", '"'),
        ("csv_profiler", "delimiter", "\n"),
        ("csv_profiler", "delimiter", "\0"),
        ("csv_profiler", "delimiter", 44),
        ("text_summariser", "sentences", 0),
        ("text_summariser", "sentences", 101),
        ("text_summariser", "sentences", 2.5),
        ("text_summariser", "sentences", False),
    ],
)
async def test_wrong_option_is_refused_by_name(name, option, value):
    """The error names the option, quotes its value and says what to send."""
    with pytest.raises(ValueError, match=rf"^`{option}` is .* must be .*: send") as caught:
        await load_agent(name).Agent().execute({TEXT_KEYS[name]: sample(name), option: value}, Context())
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
async def test_event_loop_gets_its_turns(name):
    """While a long input is worked on, other tasks run: at least once for each 20,000 characters."""
    text = "\n\n".join([sample(name)] * 10)
    report, turns = await turns_during(load_agent(name).Agent().execute({TEXT_KEYS[name]: text}, Context()))
    check_report(report)
    assert turns > len(text) / 20_000


@pytest.mark.parametrize("name", NAMES)
async def test_progress_only_moves_forward(name):
    """Reports of progress never go back, never pass the total, and say what is being done."""
    context = Context()
    await load_agent(name).Agent().execute({TEXT_KEYS[name]: "\n".join([sample(name)] * 3)}, context)
    shares = [done / total for done, total, _ in context.reports]
    assert len(shares) >= 5
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert all(note for _, _, note in context.reports)
