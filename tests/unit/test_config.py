"""Configuration: one file, variables over it, every mistake named."""

from pathlib import Path

import pytest

from headrace.cache import Strategy
from headrace.config import Config, ServerConfig, leaves, load_config
from headrace.errors import ConfigError


def file_with(tmp_path, text):
    path = tmp_path / "headrace.toml"
    path.write_text(text)
    return path


def test_without_anything_the_defaults_hold():
    """No file and no variable is a complete configuration."""
    assert load_config() == Config()


def test_a_file_sets_every_kind_of_value(tmp_path):
    """Tables, lists of tables, enums, paths, numbers and off-switches."""
    path = file_with(
        tmp_path,
        """
        [server]
        port = 9000
        [cache]
        memory = false
        [cache.remote]
        url = "redis://cache:6379/0"
        timeout = 1
        [[cache.policies]]
        match = "user:*"
        strategy = "write-behind"
        ttl = 60
        [[database.shards]]
        name = "a"
        dsn = "postgresql:///a"
        weight = 2
        [embedded]
        directory = "/srv/headrace"
        """,
    )
    config = load_config(path)
    assert (config.server.port, config.cache.memory) == (9000, None)
    assert config.cache.remote is not None
    assert config.cache.remote.timeout == 1.0
    assert config.cache.policies[0].strategy is Strategy.WRITE_BEHIND
    assert (config.database.shards[0].name, config.database.shards[0].weight) == ("a", 2.0)
    assert config.embedded.directory == Path("/srv/headrace")


def test_variables_win_over_the_file(tmp_path):
    """Their names are the paths, their values TOML or plain text."""
    path = file_with(tmp_path, "[server]\nport = 9000\nworkers = 3")
    environment = {
        "HEADRACE_SERVER_PORT": "9001",
        "HEADRACE_CACHE_REMOTE_URL": "redis://cache:6379/0",
        "HEADRACE_EMBEDDED_REDIS": "false",
        "OTHER_SERVER_PORT": "1",
    }
    config = load_config(path, environment=environment)
    assert (config.server.port, config.server.workers, config.embedded.redis) == (9001, 3, False)
    assert config.cache.remote is not None
    assert config.cache.remote.url == "redis://cache:6379/0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1", r"'server\.prot' does not exist\. Did you mean 'port'"),
        ("[sever]\nport = 1", "'sever' does not exist. Did you mean 'server'"),
        ("[[cache.policies]]\nmatsch = '*'", r"'cache\.policies\[0\]\.matsch'.*'match'"),
        ("[server]\nport = 'x'", r"server\.port is 'x'"),
        ("[server]\nport = 70000", "70000"),
        ("server = 5", "must be a table"),
        ("[cache]\npolicies = 5", "list of tables"),
        ("[[cache.policies]]\nstrategy = 'magic'", "it is one of cache-aside"),
        ("[log]\nformat = 'xml'", "auto, console, json"),
        ("not toml", "no valid TOML"),
        ("[server]\nhost = '0.0.0.0'", "no server.token"),
        ("[server]\ntoken = 'short'", "at least 16"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, said):
    """The key, the value and the rule, and the nearest name that exists."""
    with pytest.raises(ConfigError, match=said):
        load_config(file_with(tmp_path, text))


def test_a_variable_that_names_nothing_is_refused():
    """A typo in the environment would otherwise silently do nothing."""
    with pytest.raises(ConfigError, match=r"HEADRACE_SERVER_PROT names no setting\. Did you mean '\w+_PORT'"):
        load_config(environment={"HEADRACE_SERVER_PROT": "1"})


def test_a_missing_file_is_named(tmp_path):
    """With the reason of the system."""
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")


def test_secrets_are_not_shown(tmp_path):
    """Neither in the listing, nor in a repr, nor in an error."""
    secret = "correct horse battery staple"
    config = Config(server=ServerConfig(token=secret))
    assert dict(leaves(config))["server.token"] == "***"
    assert secret not in repr(config)
    with pytest.raises(ConfigError) as caught:
        load_config(file_with(tmp_path, f"[server]\ntoken = ['{secret}']"))
    assert secret not in str(caught.value)


def test_every_setting_is_listed_once():
    """`headrace doctor` shows all that is in force."""
    names = [name for name, _ in leaves(Config())]
    assert len(names) == len(set(names))
    assert {"server.port", "cache.memory.entries_max", "database.slots", "agents.timeout_s"} <= set(names)


@pytest.mark.parametrize("token", ["12345678901234567890", "true", "[1, 2, 3, 4, 5, 6]", '"0123456789abcdef"'])
def test_a_variable_of_a_text_setting_is_taken_as_it_is(token):
    """A token of digits is a token, not a number; nothing of it is read as TOML."""
    token = token.ljust(16, "0")
    environment = {
        "HEADRACE_SERVER_TOKEN": token,
        "HEADRACE_CACHE_REMOTE_PASSWORD": token,
        "HEADRACE_EMBEDDED_DIRECTORY": "2026",
    }
    config = load_config(environment=environment)
    assert config.server.token == token
    assert config.cache.remote is not None
    assert config.cache.remote.password == token
    assert config.embedded.directory == Path("2026")


@pytest.mark.parametrize(
    "text",
    [
        "[cache]\nremote = 'redis://me:hunter2@cache/0'",
        "[cache.remote]\nurl = ['redis://me:hunter2@cache/0']",
        "[database]\nshards = 'postgresql://me:hunter2@host/db'",
        "[database]\nshards = ['postgresql://me:hunter2@host/db']",
        "[[database.shards]]\nname = 'a'\ndsn = ['postgresql://me:hunter2@host/db']",
        "server = 'hunter2'",
    ],
)
def test_a_misplaced_secret_is_not_shown(tmp_path, text):
    """The error names the key and the kind of the value, never a value that may hold a password."""
    with pytest.raises(ConfigError) as caught:
        load_config(file_with(tmp_path, text))
    assert "hunter2" not in str(caught.value)
    assert any(key in str(caught.value) for key in ("cache.remote", "database.shards", "server"))


def test_a_variable_below_what_is_no_table_is_told(tmp_path):
    """The file says that there is no memory tier, the variable sets one of its settings."""
    path = file_with(tmp_path, "[cache]\nmemory = false")
    with pytest.raises(ConfigError, match=r"cache\.memory is a boolean; HEADRACE_CACHE_MEMORY_ENTRIES_MAX needs"):
        load_config(path, environment={"HEADRACE_CACHE_MEMORY_ENTRIES_MAX": "5"})


def test_a_missing_key_is_named(tmp_path):
    """A shard without a dsn leads nowhere."""
    with pytest.raises(ConfigError, match=r"database\.shards\[0\]\.dsn' is missing"):
        load_config(file_with(tmp_path, "[[database.shards]]\nname = 'a'"))
