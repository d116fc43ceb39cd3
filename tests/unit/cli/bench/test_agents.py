from headrace.cli.bench.agents import SOURCE_BYTES, source


async def test_a_source_is_a_working_agent_of_the_promised_size():
    """Compiling it costs what an agent of that size costs, and it echoes its input."""
    text = source("a-1")
    namespace = {}
    exec(compile(text, "agent", "exec"), namespace)

    assert SOURCE_BYTES <= len(text) < SOURCE_BYTES * 1.05
    assert await namespace["Agent"]().execute({"x": 1}, None) == {"echo": {"x": 1}}
    assert namespace["score_2"]([1, None, 2]) == {"score": 2.0, "weight": 2}


def test_two_agents_do_not_share_a_source():
    """A cache that knows one of them does not know the other."""
    assert source("a-1") != source("a-2")
