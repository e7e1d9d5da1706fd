"""Rules are reasons with examples: every example is judged, every page comes from them."""

from __future__ import annotations

import re
from inspect import cleandoc, signature
from pathlib import Path
from typing import Any

import pytest

from shardmig.errors import ConfigError
from shardmig.lint import New, judge, lint_script
from shardmig.lint.app import lint_statement
from shardmig.lint.catalogue import BY_CODE, RULES
from shardmig.lint.explain import explain, page
from shardmig.lint.names import REFUSED
from shardmig.operations import move_rows

DOCS = Path(__file__).parents[1] / "docs"
NEW = New(tables=frozenset({"invoice"}), columns={"t": frozenset({"n", "m"})})
WITH_EXAMPLES = [rule for rule in RULES if rule.VALID or rule.INVALID]


def codes(rule: Any, text: Any) -> Any:
    match rule.context:
        case "script":
            found = lint_script(text)
        case "application":
            found = lint_statement(text)
        case "reverse":
            found = judge(text, context="reverse", new=NEW, restores={"t": ("a",)})
        case "move":
            found = judge(text, context="move", new=NEW)
        case _:
            found = judge(text)
    return {violation.code for violation in found}


@pytest.mark.parametrize("rule", WITH_EXAMPLES, ids=lambda rule: rule.code)
def test_a_rule_refuses_its_invalid_examples_and_no_valid_one(rule: Any) -> None:
    for text in rule.INVALID:
        assert rule.code in codes(rule, text), text
    for text in rule.VALID:
        assert rule.code not in codes(rule, text), text


@pytest.mark.parametrize("rule", WITH_EXAMPLES, ids=lambda rule: rule.code)
def test_a_valid_example_breaks_no_other_rule(rule: Any) -> None:
    for text in rule.VALID:
        assert {code for code in codes(rule, text) if not BY_CODE[code].warning} == set(), text


def test_codes_and_names_are_unique_and_in_order() -> None:
    assert len({rule.code for rule in RULES}) == len({rule.name for rule in RULES}) == len(RULES)
    prefixes = [rule.code[:2] for rule in RULES]
    assert prefixes == sorted(prefixes, key=("SM", "SP", "SA").index)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_says_what_why_an_example_and_what_to_write_instead(rule: Any) -> None:
    text = cleandoc(rule.__doc__)

    assert rule.summary().startswith(("Refuses ", "Warns ", "Finds "))
    assert [word in text for word in ("\nWhy: ", "\nExample: ", "\nUse instead: ")] == [True] * 3


def test_what_is_opaque_destructive_or_our_own_can_never_be_allowed() -> None:
    never = ("SM001", "SM002", "SM003", "SM006", "SM007", "SM010", *(f"SM1{n:02}" for n in range(1, 15)), "SM302")

    assert [code for code in never if code in BY_CODE and BY_CODE[code].ignorable] == []


def test_every_move_that_a_cure_writes_has_arguments_that_there_are() -> None:
    cures = [rule.fix for rule in RULES] + [cure for _, cure in REFUSED.values()]
    calls = [call for cure in cures for call in re.findall(r"move_rows\(([^()]*)\)", cure)]
    words = {word for call in calls for word in re.findall(r"(\w+)=", call)}

    assert calls
    assert words <= signature(move_rows).parameters.keys()


def test_the_docs_page_is_what_the_classes_say() -> None:
    assert (DOCS / "rules.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_explaining_a_rule_shows_its_examples(rule: Any) -> None:
    text = explain(rule.code.lower())

    assert text.startswith(f"{rule.code} {rule.name}\n")
    assert ("Refused:" in text or "Warned about:" in text) == bool(rule.INVALID)


def test_explaining_everything_is_one_line_a_rule_and_an_unknown_code_names_its_neighbours() -> None:
    assert len(explain().splitlines()) == len(RULES)
    with pytest.raises(ConfigError, match="SM101"):
        explain("SM199")
