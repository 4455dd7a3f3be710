"""The words and the table of a page of findings on phase 1: is the hierarchy in the language model's geometry?"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..geometry.controls import METRICS
from ..report.words import DASH, listed, markdown_table, number
from .summary import Summary, variants

Blocks = dict[str, dict[str, str]]  # texts of the evidence's numbers by their name, for the hierarchy and every control


def decisions(found: Summary) -> list[str]:
    """What the decision of phase 1 says of the hierarchy and of its controls, once for the hooks that agree."""
    said: dict[str, list[str]] = {}
    for hook in found.shown_hooks:
        blocks = variants(found.hooks.get(hook, {}).get("evidence", {}))
        decided = {name: block["decision"] for name, block in blocks.items() if "decision" in block}
        if "main" in decided:
            main = decided.pop("main")
            failed = [name.replace("_", " ") for name, test in main["tests"].items() if not test["passes"]]
            line = f"the decision on the evidence, at alpha {main['alpha']}, "
            lacking = "" if main["hierarchy"] else f" (docs/method.md, section 3; failed: {listed(failed)})"
            line += ("calls" if main["hierarchy"] else "does not call") + f" the concepts a hierarchy{lacking}"
            for kind, of_kind in (("controls", False), ("other metrics", True)):
                names = [name for name in decided if (name in METRICS) == of_kind]
                calls = [name.replace("_", " ") for name in names if decided[name]["hierarchy"]]
                line += f"; {kind} that it calls one: {listed(calls) if calls else 'none'} of {len(names)}"
            said.setdefault(f"{line}.", []).append(hook)
    return [f"- At {listed(hooks)}: {line}" for line, hooks in said.items()]


def evidence(found: Summary) -> list[str]:
    """The evidence of every hook; once for hooks of which one has all that another has."""
    lines: list[str] = []
    shown: list[tuple[Blocks, list[str]]] = []
    of_hook = {hook: _blocks(found.hooks.get(hook, {}).get("evidence", {})) for hook in found.shown_hooks}
    for hook, blocks in sorted(of_hook.items(), key=lambda item: -len(item[1])):
        same = next((hooks for larger, hooks in shown if blocks.items() <= larger.items()), None)
        if same is not None:
            same.append(hook)
        elif blocks:
            shown.append((blocks, [hook]))
    for blocks, (first, *others) in shown:
        lines += [
            f"At {first}{f'; {listed(others)} have the same' if others else ''}:",
            "",
            *_evidence_table(blocks),
            "",
        ]
    return lines[:-1] if lines else ["Not there: `runs/HOOK.json` is missing."]


def _blocks(evidence: dict[str, Any]) -> Blocks:
    found = {name: dict(_numbers(block)) for name, block in variants(evidence).items()}
    return {name: numbers for name, numbers in found.items() if set(numbers.values()) != {DASH}}


def _evidence_table(blocks: Blocks) -> list[str]:
    """A row for every number of the hierarchy's evidence, a column for the hierarchy and every control or metric."""
    names = list(next(iter(blocks.values())))
    rows = [[name.replace("_", " "), *(numbers.get(name, DASH) for numbers in blocks.values())] for name in names]
    return markdown_table(["", *(name.replace("_", " ") for name in blocks)], rows)


def _numbers(block: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of the numbers in a block of evidence.json, an interval behind its value, nested ones too."""
    for name, value in block.items():
        if isinstance(value, dict) and name not in ("parents", "children"):
            if "median" in value:
                yield before + name, number(value["median"]) + bounds(value.get("ci95"))
            else:
                yield from _numbers(value, f"{before}{name}: ")
        elif isinstance(value, bool):
            yield before + name, "yes" if value else "no"
        elif (isinstance(value, int | float) or value is None) and name not in ("n", "alpha") and "ci95" not in name:
            stem = name.removeprefix("median_").removesuffix("_deg")
            keys = (f"{name}_ci95", f"{stem}_ci95", "median_ci95" if stem == "angle" else "")
            yield before + name, number(value) + bounds(next((block[key] for key in keys if block.get(key)), None))


def bounds(ci95: Sequence[float] | None, factor: float = 1.0, digits: int = 3) -> str:
    """' [0.12, 0.34]', to stand behind a value; nothing where there is no interval."""
    if ci95 is None:
        return ""
    low, high = (number(bound * factor, digits) for bound in ci95)
    return f" [{low}, {high}]"
