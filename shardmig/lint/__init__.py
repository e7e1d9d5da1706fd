"""
The linter: a closed world that nothing slips past.

A statement passes because every node and every set field of its tree is known to be additive; anything else is a
violation, also what nobody thought of. `accept` is the only door to the runner.
"""

from __future__ import annotations

from shardmig.lint.plans import History, accept, lint_plan
from shardmig.lint.scope import New
from shardmig.lint.script import lint_script
from shardmig.lint.statements import judge
from shardmig.lint.violation import Rule, Violation

__all__ = ["History", "New", "Rule", "Violation", "accept", "judge", "lint_plan", "lint_script"]
