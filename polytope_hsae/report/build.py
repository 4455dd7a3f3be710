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
from .figures import figures
from .palette import arm_styles, css_variables
from .read import RunFiles, read_run
from .summary import hierarchy, massive_rows, summary
from .svg import Drawing
from .targets import informative_passes, target_rows
from .tree import tree_data
from .words import LABELS, arm_meaning, arm_title, corpus_meaning, counted, model_meaning

# id and heading, in the page's order
SECTIONS = {
    "summary": "Summary",
    "targets": "Targets",
    "tree": "Parents and children",
    "arms": "Arms",
    "training": "Training curves",
    "hierarchy": "Is there a hierarchy?",
    "config": "Config and provenance",
    "glossary": "Glossary",
}


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
    config, tree = run.config, tree_data(run)
    details = [tables.concepts_table(run), tables.steering_table(run), *tables.difference_tables(run)]
    evidence = [tables.interventions_table(run), tables.parents_table(run)]
    return {
        "sections": SECTIONS,
        "name": config.run.name,
        "results": run.results,
        "evidence": run.evidence,
        "latents": run.latents,
        "facts": facts(run),
        "arms": [arm_facts(run, name) for name in run.arms],
        "massive_rows": massive_rows(run),
        "summary": summary(run),
        "targets": target_rows(run),
        "verdicts": Counter(target["verdict"] for target in run.results["targets"]),
        "informative": informative_passes(run),
        "min_rows": config.concepts.min_test_rows,
        "schedule": config.training.schedule,
        "arm_tables": tables.arm_tables(run),
        "detail_tables": [table for table in details if any(table.groups.values())],
        "hierarchy": hierarchy(run),
        "has_hierarchy": run.has_hierarchy,
        "evidence_table": tables.evidence_table(run),
        "evidence_details": [table for table in evidence if any(table.groups.values())],
        "figures": {name: Markup(drawing.inline) for name, drawing in drawn.items()},
        "tree_json": htmlsafe_json_dumps(tree, separators=(",", ":")),
        "tree_arms": [(name, arm_title(name)) for name, found in tree["arms"].items() if found["parents"]],
        "phases": tables.phases_table(run),
        "versions": tables.versions(run),
        "config_text": run.config_text,
        "theme": {"light": Markup(css_variables(0)), "dark": Markup(css_variables(1))},
    }


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What was measured, and on what."""
    children = len(run.evidence["main"]["children"]["parent"])
    return [
        ("Language model", model_meaning(run.config)),
        ("Text", corpus_meaning(run.config)),
        ("Label of a row", f"{LABELS[run.results['label']]} ({run.results['label']})"),
        ("Measured on", f"{run.results['split']} split, {run.latents['n_rows']:,} rows"),
        ("Concepts", f"{len(run.concepts['parents'])} parents, {children} children"),
    ]


def arm_facts(run: RunFiles, arm: str) -> dict[str, str]:
    """An arm's name, colour, how it was made, its size, and the rows it was trained on."""
    record, found = run.train[arm], run.latents["arms"][arm]
    n, children = found["n_parents"], found["n_children"]
    latents = f"{counted(n, 'parent')} with {children:,} children each" if children else counted(n, "latent")
    trained = f"{record['steps']:,} steps, {record['tokens']:,} rows"
    if run.store is not None:
        trained += f" ({record['tokens'] / run.store['rows']['train']:.1f} epochs)"
    return {
        "title": arm_title(arm),
        "colour": arm_styles(run.config)[arm][0],
        "meaning": arm_meaning(run.config, arm),
        "size": f"{latents}, {counted(record['parameters'], 'parameter')}; {trained}",
    }
