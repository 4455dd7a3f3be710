"""The figures of a page of findings: targets by hook and seed, the evidence beside its controls, and the arms."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from ..geometry.controls import CONTROLS
from ..report.palette import LIGHT
from ..report.svg import Drawing, Frame, draw
from ..report.words import TARGETS, number
from .summary import TOGETHER, Summary, variants

ROW, LETTER = 0.19, 0.063  # inches: a row's height, and the width of a letter of its name
ARMS = ("purity", "leakage", "steering_leakage", "fvu")
VERDICTS = {"PASS": "s4", "FAIL": "s3", "INCONCLUSIVE": "s2"}


def drawings(found: Summary) -> dict[str, Drawing]:
    """By file name: a figure of every target, one of the evidence, and for every hook one of the arms by metric."""
    drawn = [_target(found, name) for name in TOGETHER] + _evidence(found)
    for place, hook in enumerate(found.shown_hooks):
        drawn += [_arms(found, place, hook, metric) for metric in ARMS if metric in found.metric_names]
    return {drawing.name: drawing for drawing in drawn}


def _target(found: Summary, name: str) -> Drawing:
    """A row for every hook and arm: dots are seeds, the thick dot and its bar are the value over seeds."""
    words = TARGETS[name]
    rows, required = [], [None, None]
    for hook in found.shown_hooks:
        plan = found.study.plan(hook)
        for arm in (plan.teacher, plan.control):
            seeds = found.seeds(hook, arm)
            targets = [_of(found.targets(hook, arm, chosen), name) for chosen in [*([seed] for seed in seeds), seeds]]
            if seeds and targets[-1]["measured"] is not None:
                rows.append((f"{_short(hook)}: {arm}", targets))
                required = targets[-1]["required"]

    def paint(axes: Axes) -> None:
        for y, (_, (*by_seed, over)) in enumerate(rows):
            colour = LIGHT[VERDICTS[over["verdict"]]]
            seeds = [target["measured"] * words.factor for target in by_seed if target["measured"] is not None]
            axes.plot(seeds, [y] * len(seeds), "|", color=LIGHT["muted"], markersize=8)
            if over["ci95"] is not None:
                axes.plot([bound * words.factor for bound in over["ci95"]], [y, y], color=colour, linewidth=2)
            axes.plot([over["measured"] * words.factor], [y], "o", color=colour, markersize=4.5)
        for bound in required:
            if bound is not None:
                axes.axvline(bound * words.factor, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (4, 2)))
        _name_rows(axes, [name for name, _ in rows])
        axes.set_xlabel(f"{words.name.lower()},{words.unit or ' degrees'}")

    said = "; ".join(
        f"{row}: {number(targets[-1]['measured'] * words.factor, 1)} {targets[-1]['verdict']}" for row, targets in rows
    )
    return draw(f"target-{name}", words.name, said or "no values", _frame([name for name, _ in rows]), paint)


def _of(targets: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(target for target in targets if target["name"] == name)


def _evidence(found: Summary) -> list[Drawing]:
    """One dot per parent: z of the direction that its children share, for the hierarchy, controls and other metrics."""
    of_hook = [variants(found.hooks[hook]["evidence"]) for hook in found.shown_hooks if hook in found.hooks]
    if not of_hook:
        return []
    blocks = max(of_hook, key=lambda blocks: sum(map(_has_z, blocks.values()))).items()
    rows = {name: [z for z in block["parents"]["z"] if z is not None] for name, block in blocks if _has_z(block)}
    if not rows:
        return []

    def paint(axes: Axes) -> None:
        for y, (name, values) in enumerate(rows.items()):
            colour = LIGHT["s3" if name in CONTROLS else "s1"]
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
        axes.axvline(3, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (4, 2)))
        _name_rows(axes, [name.replace("_", " ") for name in rows])
        axes.set_xlabel("z of the direction that a parent's children share")

    said = "; ".join(f"{name}: {sum(z > 3 for z in values)} of {len(values)} above 3" for name, values in rows.items())
    return [draw("evidence-z", "Do children of a parent share a direction?", said, _frame(list(rows)), paint)]


def _has_z(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("parents"), dict) and "z" in block["parents"]


def _arms(found: Summary, place: int, hook: str, metric: str) -> Drawing:
    """A row for every arm: the mean over seeds and every seed."""
    rows = [(arm, over) for arm in found.arms(hook) if (over := found.over_seeds(hook, arm, metric)) is not None]
    chance = found.chance(hook, metric)

    def paint(axes: Axes) -> None:
        for y, (arm, over) in enumerate(rows):
            values = [found.metrics(hook, seed, arm)[metric]["value"] for seed in found.seeds(hook, arm)]
            values = [value for value in values if value is not None]
            axes.plot(values, [y] * len(values), "|", color=LIGHT["muted"], markersize=7)
            axes.plot([over.mean], [y], "o", color=LIGHT["s1"], markersize=4)
        if chance is not None:
            axes.axvline(chance.mean, color=LIGHT["s3"], linewidth=0.8, linestyle=(0, (1.5, 1.5)))
        _name_rows(axes, [arm for arm, _ in rows])
        axes.set_xlabel(metric.replace("_", " "))
        axes.set_title(_short(hook))

    said = "; ".join(f"{arm}: {number(over.mean)}" for arm, over in rows)
    frame = _frame([arm for arm, _ in rows])
    return draw(f"arms-{place}-{metric}", f"{metric} at {hook}", said or "no values", frame, paint)


def _short(hook: str) -> str:
    return hook.removesuffix("_pre_unembed").replace("_", " ")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _frame(names: Sequence[str]) -> Frame:
    return Frame(max(1, len(names)) * ROW + 0.1, 0.2 + LETTER * max(map(len, names), default=0))
