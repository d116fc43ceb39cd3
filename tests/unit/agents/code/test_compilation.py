"""From text to code, or to the reason why not."""

import sys

import pytest

from headrace.agents.code.compilation import CodePolicy, Compilation, Refusal, compile_source
from headrace.agents.code.fingerprint import Interpreter
from headrace.errors import AgentInvalid, ConfigError

SOURCE = '''"""Counts."""
import json
import httpx

LIMIT = 3

class Agent:
    """Docs."""
    async def execute(self, input, context):
        assert input
        return LIMIT

async def other(input, context): ...
'''


def compiled(text: str, *, interpreter: Interpreter | None = None, **policy: int) -> Compilation | Refusal:
    return compile_source(text, policy=CodePolicy(**policy), interpreter=interpreter or Interpreter.current())


def test_the_code_does_what_the_source_says():
    """It is compiled as a module of its own, with nothing inherited from ours."""
    outcome = compiled("x: 'int' = 40 + 2")
    namespace: dict[str, object] = {}

    exec(outcome.code, namespace)

    assert namespace["x"] == 42
    assert outcome.code.co_flags & 0x1000000 == 0  # no `from __future__ import annotations`


def test_metadata_tells_of_the_source_without_running_it():
    """Whoever looks for an entrypoint finds the candidates here."""
    outcome = compiled("if open('x'): raise SystemExit\n" + SOURCE)

    assert outcome.imports == ("httpx",)
    assert outcome.metadata["definitions"] == ["Agent", "other"]
    assert outcome.metadata["lines"] == SOURCE.count("\n") + 1


def test_the_optimize_flag_is_the_interpreters():
    """Asserts and docstrings go as -O and -OO say."""
    here = Interpreter.current()
    docs = []
    for optimize in (0, 2):
        interpreter = Interpreter(
            cache_tag=here.cache_tag, magic=here.magic, hexversion=here.hexversion, optimize=optimize
        )
        namespace: dict[str, object] = {"__name__": "x"}
        exec(compiled("class Agent:\n    'Docs.'", interpreter=interpreter).code, namespace)
        docs.append(namespace["Agent"].__doc__)

    assert docs == ["Docs.", None]


def test_the_same_source_has_the_same_file_name_in_tracebacks():
    """It is shared by agents, so it is named by its content."""
    assert compiled(SOURCE).code.co_filename == compiled(SOURCE).code.co_filename
    assert compiled(SOURCE).code.co_filename != compiled(SOURCE + "\n").code.co_filename


HOSTILE = {
    "a null byte": ("x = 1\0", "null bytes"),
    "half a surrogate pair": ("x = '\ud800'", "half of a surrogate pair"),
    "a syntax error": ("x = 1\nx = ", "at line 2"),
    "nested parentheses": ("(" * 5_000 + ")" * 5_000, "nested"),
    "nested blocks": ("\n".join(" " * depth + "if 1:" for depth in range(120)), "indentation"),
    "a chain of signs": ("-" * 40_000 + "1", "nested too deeply"),
    "a chain of attributes": ("a" + ".b" * 20_000, "nested too deeply"),
    "a long sum": ("x=" + "+".join(["a"] * 20_000), "nested too deeply"),
    "nested lambdas": ("x=" + "lambda:" * 5_000 + "1", "nested too deeply"),
    "a huge number": ("x = " + "9" * 5_000, "4300 digits"),
    "many names": ("a;" * 400_000, "words and signs"),
    "a quadratic f-string": ('f"' + "{a}" * 40_000 + '"', "words and signs"),
    "many nodes": ("a\n" * 45_000, "nodes in its syntax tree"),
    "a huge text": ("x = '" + "a" * 1_100_000 + "'", "1,100,006 bytes; at most 1,048,576"),
    "a return outside": ("return 1", "outside function"),
}


@pytest.mark.parametrize(("text", "named"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_sources_are_refused_with_the_reason(text, named):
    """None of them takes the process with it, or more of its memory than the limits allow."""
    outcome = compiled(text)

    assert isinstance(outcome, Refusal)
    error = outcome.error("bad")
    assert isinstance(error, AgentInvalid)
    assert "'bad'" in error.message
    assert named in error.message


def test_nesting_may_be_the_moments_fault():
    """Whether a stack is deep enough depends on the thread; so it is asked again."""
    assert not compiled("-" * 40_000 + "1").is_lasting
    assert compiled("x = ").is_lasting


def test_constants_are_not_computed_beyond_bounds():
    """A short source that stands for a huge value compiles to what computes it, in no time."""
    outcome = compiled("def f():\n    return 9**9**9, 'a' * 10**9, (1,) * 10**8")

    assert isinstance(outcome, Compilation)
    assert max(sys.getsizeof(constant) for constant in outcome.code.co_consts) < 10_000


def test_the_limits_are_exact():
    """At the limit a source is taken, one more is too much."""
    assert isinstance(compiled("x = 1", source_bytes_max=5), Compilation)
    assert isinstance(compiled("x = 1", source_bytes_max=4), Refusal)
    assert isinstance(compiled("x = 1", nodes_max=5), Compilation)  # Module, Assign, Name, Store, Constant
    assert isinstance(compiled("x = 1", nodes_max=4), Refusal)


def test_a_limit_that_nothing_meets_is_refused():
    """When the policy is made, not when the first agent is."""
    with pytest.raises(ConfigError, match="nodes_max"):
        CodePolicy(nodes_max=0)
