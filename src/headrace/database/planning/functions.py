"""Which functions a statement calls: those that act, or answer anew each time, or as only one shard would. Pure."""

import re
from typing import Final, NamedTuple

from sqlglot import exp

# From pg_proc: what every call answers anew, or what acts. Functions of the user are unknown, and treated alike where
# it matters.
_VOLATILE = frozenset(
    re.findall(
        r"\S+",
        "random random_normal setseed clock_timestamp timeofday gen_random_uuid uuidv4 uuidv7 nextval currval lastval "
        "setval set_config pg_sleep pg_sleep_for pg_sleep_until pg_notify txid_current pg_current_xact_id "
        "pg_advisory_lock pg_advisory_xact_lock pg_try_advisory_lock pg_try_advisory_xact_lock pg_advisory_unlock "
        "pg_backend_pid pg_cancel_backend pg_terminate_backend lo_create lo_import dblink dblink_exec",
    )
)
_DIFFERS_BY_SHARD = frozenset(
    re.findall(
        r"\S+",
        "now transaction_timestamp statement_timestamp current_database current_catalog current_user session_user "
        "inet_server_addr pg_current_wal_lsn",
    )
)
_VOLATILE_NODES = (exp.Rand, exp.Uuid)
_POSTGRES_NAMES: Final[dict[type[exp.Expr], str]] = {exp.Rand: "random", exp.Uuid: "gen_random_uuid"}
_CLOCK_NODES = (exp.CurrentTimestamp, exp.CurrentDate, exp.CurrentTime, exp.Localtimestamp, exp.Localtime)

_HARMLESS: Final = frozenset(
    re.findall(
        r"\S+",
        "abs ceil floor round trunc sign sqrt power mod exp ln log div gcd lcm width_bucket scale "
        "min_scale trim_scale length char_length octet_length bit_length lower upper initcap btrim ltrim "
        "rtrim lpad rpad left right reverse repeat replace split_part strpos substr substring translate "
        "concat concat_ws format md5 sha256 encode decode ascii chr to_char to_date to_number "
        "to_timestamp to_hex quote_ident quote_literal starts_with regexp_replace regexp_match "
        "regexp_matches regexp_count regexp_like regexp_substr string_to_array array_to_string "
        "array_length cardinality unnest generate_series generate_subscripts array_append array_prepend "
        "array_cat array_position array_remove array_replace array_upper array_lower date_part "
        "date_trunc date_bin age make_date make_interval make_time make_timestamp make_timestamptz "
        "justify_days justify_hours justify_interval isfinite every bool_and bool_or bit_and bit_or "
        "bit_xor any_value jsonb_build_object json_build_object jsonb_array_length jsonb_typeof json_agg "
        "jsonb_agg jsonb_extract_path_text jsonb_extract_path row_to_json to_json to_jsonb jsonb_set "
        "greatest least nullif coalesce num_nulls num_nonnulls hashtext hashtextextended "
        "hashint8extended pg_typeof lag lead ntile rank dense_rank row_number percent_rank cume_dist "
        "first_value last_value nth_value mode percentile_cont percentile_disc factorial degrees radians "
        "pi sin cos tan atan atan2 cbrt",
    )
)
"""Functions of Postgres that sqlglot does not know and that neither act nor depend on anything but their arguments."""


class Functions(NamedTuple):
    """By what they do to routing."""

    volatile: tuple[str, ...]
    """What answers differently at every call, or acts."""
    clocks: tuple[str, ...]
    """What answers as its shard alone would: now() and its like."""
    unknown: tuple[str, ...]
    """What is not known to be harmless: functions of users."""


def functions(tree: exp.Expr) -> Functions:
    """The functions of a tree that it matters to know."""
    volatile: dict[str, None] = {}
    clocks: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for node in tree.find_all(exp.Func):
        name = node.name if isinstance(node, exp.Anonymous) else _POSTGRES_NAMES.get(type(node)) or node.sql_name()
        name = name.lower()
        if name in _VOLATILE or isinstance(node, _VOLATILE_NODES):
            volatile[name] = None
        elif name in _DIFFERS_BY_SHARD or isinstance(node, _CLOCK_NODES):
            clocks[name] = None
        elif isinstance(node, exp.Anonymous) and name not in _HARMLESS:
            unknown[name] = None
    return Functions(tuple(volatile), tuple(clocks), tuple(unknown))
