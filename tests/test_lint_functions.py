"""The curated lists against pg_proc, pg_operator, pg_type and pg_opclass of a real server."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from shardmig.lint import datatypes, functions


@pytest.fixture(scope="module")
def connection(servers: Any) -> Any:
    with psycopg.connect(servers[0].url(), autocommit=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def volatility(connection: Any) -> Any:
    rows = connection.execute(
        "SELECT proname, array_agg(DISTINCT provolatile::text) FROM pg_proc"
        " WHERE pronamespace = 'pg_catalog'::regnamespace GROUP BY 1"
    ).fetchall()
    return {name: set(kinds) for name, kinds in rows}


# Names that are functions only to the grammar.
GRAMMAR = {"overlaps"}


def test_every_listed_function_exists(volatility: Any, connection: Any) -> None:
    listed = (
        functions.IMMUTABLE
        | functions.STABLE
        | functions.VOLATILE
        | functions.AGGREGATES
        | functions.WINDOWS
        | functions.SETS
        | functions.CLOCK
        | functions.SEQUENCE
    )
    newer = {name for name, since in functions.SINCE.items() if since * 10000 > connection.info.server_version}

    assert listed - newer - volatility.keys() - GRAMMAR == set()


def test_total_functions_are_immutable_in_every_overload(volatility: Any) -> None:
    changing = {name for name in functions.TOTAL if volatility[name] != {"i"}}

    assert changing == {"length"}  # length(bytea, name): only one argument is taken where it must not fail


def test_no_listed_function_is_more_volatile_than_its_list_says(volatility: Any) -> None:
    for name in functions.IMMUTABLE | functions.WINDOWS:
        assert "v" not in volatility.get(name, set()), name
    for name in functions.STABLE | functions.SETS | functions.AGGREGATES | functions.CLOCK:
        assert "v" not in volatility.get(name, set()), name


def test_functions_that_run_sql_or_reach_outside_are_on_no_list() -> None:
    pure = functions.IMMUTABLE | functions.STABLE | functions.VOLATILE | functions.AGGREGATES | functions.SETS

    assert functions.SIDE_EFFECTS & pure == set()


def test_every_listed_operator_and_operator_class_is_postgresqls_own(connection: Any) -> None:
    operators = {row[0] for row in connection.execute("SELECT oprname FROM pg_operator WHERE oid < 16384")} | {"!="}
    classes = {row[0] for row in connection.execute("SELECT opcname FROM pg_opclass WHERE oid < 16384")}

    assert functions.OPERATORS - operators == set()
    assert functions.OPERATOR_CLASSES - classes == set()


def test_comparable_types_have_an_equality_operator_and_the_others_do_not(connection: Any) -> None:
    connection.execute("DROP TABLE IF EXISTS pg_temp.kinds")
    for name in sorted(datatypes.ANY):
        quoted = f'pg_catalog."{name}"'
        try:
            connection.execute(f"SELECT DISTINCT NULL::{quoted}")
            equal = True
        except psycopg.errors.UndefinedFunction:
            equal = False

        assert equal == (name in datatypes.COMPARABLE), name


def test_a_listed_strict_function_gives_no_null_for_arguments_that_are_none(connection: Any) -> None:
    rows = connection.execute(
        "SELECT DISTINCT proname FROM pg_proc WHERE proname = ANY(%s) AND NOT proisstrict AND pronargs > 0"
        " AND pronamespace = 'pg_catalog'::regnamespace",
        (sorted(functions.STRICT),),
    ).fetchall()
    # These treat NULL as a value and never return it themselves.
    never_null = {"concat", "jsonb_build_array", "jsonb_build_object", "json_build_array", "json_build_object"}
    ranges = {"int4range", "int8range", "numrange", "daterange", "tsrange", "tstzrange"}

    assert {name for (name,) in rows} <= never_null | ranges | {"make_interval"}
