"""Write a run's report: one page that needs nothing but itself, and its figures as files."""

from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from ..fileio import update_text
from . import tables
from .advice import advise, longer
from .figures import figures
from .hierarchy import answers
from .palette import arm_styles, css_variables
from .read import RunFiles, read_run
from .steering import interventions_table, steering_grid
from .summary import massive_rows, summary
from .svg import Drawing
from .targets import informative_passes, target_rows
from .tree import tree_data
from .words import arm_meaning, arm_title, corpus_meaning, hsae_size, label_meaning, listed, model_meaning, number


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/*.svg` into a finished run's folder; returns the page's path.

    Both follow from the run's files alone: the same files give the same bytes, and a file is rewritten only when its
    bytes change. Raises ValueError (one line) when phase 4 is not finished or one of the files is missing.
    """
    run = read_run(Path(folder))
    drawn = figures(run)
    for drawing in drawn.values():
        update_text(Path(folder) / "figures" / f"{drawing.name}.svg", drawing.standalone)
    page = Path(folder) / "report.html"
    update_text(page, render(run, drawn))
    return page


def render(run: RunFiles, drawn: dict[str, Drawing]) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inline"] = lambda name: Markup(_template(name))
    return environment.get_template("report.html").render(view(run, drawn))


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def view(run: RunFiles, drawn: dict[str, Drawing]) -> dict[str, Any]:
    """Everything that the template shows."""
    styles = arm_styles(run.config)
    tree = tree_data(run)
    config = run.config
    budgets = {name: budget(run, name) for name in run.arms}
    return {
        "name": config.run.name,
        "results": run.results,
        "model_meaning": model_meaning(config),
        "corpus_meaning": corpus_meaning(config),
        "label_meaning": label_meaning(run.results["label"]),
        "arms": [
            {
                "title": arm_title(name),
                "meaning": arm_meaning(config, name),
                "colour": styles[name][0],
                "budget": budgets[name],
                "parameters": run.train[name]["parameters"],
            }
            for name in run.arms
        ],
        "budgets": sorted(set(budgets.values())),
        "sizes": sizes(run),
        "massive_rows": massive_rows(run),
        "summary": summary(run),
        "targets": target_rows(run),
        "verdicts": Counter(target["verdict"] for target in run.results["targets"]),
        "informative": informative_passes(run),
        "advice": advise(run),
        "longer": longer(run),
        "anchor": config.teacher.anchor,
        "min_rows": config.concepts.min_test_rows,
        "q_floor": number(1 / (run.evidence["permutations"] + 1), 3),
        "schedule": config.training.schedule,
        "arms_table": tables.arms_table(run),
        "reference": arm_title(run.ablations["reference"]),
        "differences": tables.differences_table(run, run.ablations["differences"]),
        "leads": tables.differences_table(run, run.ablations["against_teacher"]),
        "concepts": tables.concepts_table(run),
        "figures": {name: Markup(drawing.inline) for name, drawing in drawn.items()},
        "evidence": run.evidence,
        "has_hierarchy": run.has_hierarchy,
        "answers": answers(run),
        "interventions": interventions_table(run),
        "steering_grid": steering_grid(run),
        "evidence_table": tables.evidence_summary(run),
        "parents": tables.parents_table(run),
        "n_children": len(run.evidence["main"]["children"]["parent"]),
        "latents": run.latents,
        "tree_json": htmlsafe_json_dumps(tree, separators=(",", ":")),
        "tree_arms": [(name, arm_title(name)) for name, found in tree["arms"].items() if found["parents"]],
        "phases": tables.phases_table(run),
        "commits": tables.mixed_commits(run),
        "versions": tables.versions(run),
        "config_text": run.config_text,
        "theme": {"light": Markup(css_variables(0)), "dark": Markup(css_variables(1))},
    }


def sizes(run: RunFiles) -> list[tuple[str, str]]:
    """(arms, their size) for every size that there is."""
    found: dict[str, list[str]] = {}
    for name in run.arms:
        said = f"{run.latents['arms'][name]['n_parents']:,} latents"
        if l0 := run.metric(name, "l0"):
            said += f", on average {number(l0['value'], 1)} active in a row"
        if name not in run.flat_arms:
            said = hsae_size(run.config.arm_hsae(run.config.arm(name)))
        found.setdefault(said, []).append(arm_title(name))
    return [(listed(names), said) for said, names in found.items()]


def budget(run: RunFiles, arm: str) -> str:
    """What an arm was trained on: steps, rows shown, and how many distinct rows those are where that is known."""
    record = run.train[arm]
    shown = f"{record['steps']:,} steps, {record['tokens']:,} rows shown"
    if run.store is None:
        return shown
    distinct = run.store["rows"]["train"]
    return f"{shown} (the {distinct:,} rows of the train split, {record['tokens'] / distinct:.1f} times each)"
