"""SP0xx: the script, before it is imported."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = ["UnusedAllow"]


class UnusedAllow(Rule):
    """
    Refuses allow comments that allow nothing, lack a reason, or name what can never be allowed.

    Why: a comment that silences nothing today may silence something tomorrow; one without a reason cannot be reviewed.
    Example: `# shardmig: allow SM125`.
    Use instead: `# shardmig: allow SM125 -- nobody selects DISTINCT * from t`, on the call.
    """

    code, name, context = "SP020", "unused-allow", "script"
