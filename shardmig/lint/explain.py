"""Rules explained: the text of `shardmig rule CODE`, and the page of all of them."""

from __future__ import annotations

from inspect import cleandoc
from typing import TYPE_CHECKING

from shardmig.errors import ConfigError
from shardmig.lint.catalogue import BY_CODE, RULES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.lint.violation import Rule

__all__ = ["explain", "page"]

_GROUPS = {
    "SM0": "Text and names",
    "SM1": "Structure",
    "SM2": "Moves",
    "SM3": "Functions and expressions",
    "SP0": "The script",
    "SA0": "Application code",
}
_HEADINGS = ("Why:", "Example:", "Use instead:")


def explain(code: str | None = None) -> str:
    """
    Explain one rule, or list all.

    Raises:
        ConfigError: there is no such rule; names those that begin like it.
    """
    if code is None:
        return "".join(f"{rule.code}  {rule.name:<28} {rule.summary()}\n" for rule in RULES)
    rule = BY_CODE.get(code.upper())
    if rule is None:
        near = ", ".join(known for known in BY_CODE if known.startswith(code.upper()[:3])) or ", ".join(_GROUPS)
        raise ConfigError(f"there is no rule {code}; there are {near}")
    return "\n".join(_explained(rule)) + "\n"


def page() -> str:
    """Return docs/rules.md."""
    parts = [
        "# Rules of the linter\n",
        "Generated from the rule classes (`shardmig.lint.explain.page`); edit those.\n",
        "A rule that may be allowed says so: `# shardmig: allow CODE -- reason` on the call.\n",
    ]
    group = ""
    for rule in RULES:
        if not rule.code.startswith(group) or not group:
            group = rule.code[:3]
            parts.append(f"## {group}xx: {_GROUPS[group]}\n")
        parts.append("\n".join(_section(rule)) + "\n")
    return "\n".join(parts)


def _explained(rule: type[Rule]) -> Iterator[str]:
    yield f"{rule.code} {rule.name}"
    yield ""
    yield cleandoc(rule.__doc__ or "")
    if rule.notices:
        yield f"Old code notices: {rule.notices}."
    yield f"May be allowed: {_may_be_allowed(rule)}"
    for title, texts in (("Refused" if not rule.warning else "Warned about", rule.INVALID), ("Fine", rule.VALID)):
        if texts:
            yield ""
            yield f"{title}:"
            for text in texts:
                yield from (f"    {line}" for line in _shown(text).split("\n"))
                yield ""
    if rule.fix:
        yield "Write:"
        yield from (f"    {line}" for line in rule.fix.split("\n"))


def _section(rule: type[Rule]) -> Iterator[str]:
    yield f"### {rule.code} {rule.name}\n"
    for line in cleandoc(rule.__doc__ or "").split("\n"):
        heading = next((h for h in _HEADINGS if line.startswith(h)), None)
        yield line if heading is None else f"\n**{heading}**{line.removeprefix(heading)}"
    if rule.notices:
        yield f"\n**Old code notices:** {rule.notices}."
    yield f"\n**May be allowed:** {_may_be_allowed(rule)}\n"
    if rule.INVALID:
        yield "```" + _language(rule)
        yield "\n".join(_shown(text) for text in rule.INVALID[:3])
        yield "```"


def _may_be_allowed(rule: type[Rule]) -> str:
    if rule.warning:
        return "it is a warning and fails nothing; a comment silences it."
    return "yes, with a reason." if rule.ignorable else "never."


def _language(rule: type[Rule]) -> str:
    return "python" if rule.context == "script" else "sql"


def _shown(text: str) -> str:
    """Return an example with everything invisible made visible, and long ones cut."""
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.rstrip("\n"))
    return shown if len(shown) < 400 else shown[:60] + " …"  # noqa: PLR2004 - what a reader takes in
