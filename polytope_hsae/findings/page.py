"""`hsae findings write`: the page of findings, its figures and results.json, from a study's files alone.

Every statement is computed from the records: change them, and the words change with the numbers.
"""

from pathlib import Path
from typing import Any

from ..config import Config
from ..evaluation.targets import MIN_UNITS, counted_units
from ..fileio import update_text, write_json
from ..report.words import DASH, TARGETS, TargetWords, counted, listed, markdown_table, number
from ..study.results import TOLERANCE, Spread
from .evidence import bounds, decisions, evidence
from .figures import drawings
from .plan import Findings
from .summary import FAIL, OF_CONCEPTS, PASS, TOGETHER, Summary, read_summary, results

AIM = 2  # hooks at which the targets should pass together
UNMATCHED = " †"  # stands behind an arm that is not compared at matched L0
HELD_OUT = {"val": "validation", "test": "test"}


def write_page(folder: Path, page: Path, split: str) -> list[Path]:
    """Write the page, its figures in a folder of its name, and results.json; the same records give the same bytes."""
    found = read_summary(folder, split)
    figures = page.with_suffix("")
    drawn = drawings(found)
    for name, drawing in drawn.items():
        update_text(figures / f"{name}.svg", drawing.standalone)
    update_text(page, text(found, {name: f"{figures.name}/{name}.svg" for name in drawn}))
    write_json(folder / "results.json", results(found))
    return [page, folder / "results.json", *(figures / f"{name}.svg" for name in drawn)]


def text(found: Summary, figures: dict[str, str]) -> str:
    """The page as Markdown; figures: path by name."""
    lines = [f"# Findings: {found.study.name}", "", *_made_from(found), "", "## In short", "", *_in_short(found)]
    lines += ["", "## The five targets", "", *_targets_words(found), *_pictures(figures, "target")]
    for hook in found.shown_hooks:
        lines += ["", f"### Targets at {hook}", "", *_targets(found, hook)]
    lines += ["", "## What is missed, and by how much", "", *_missed(found)]
    lines += ["", "## Arms", "", *_arms(found.study)]
    lines += ["", "## Ablations", "", *_ablation_words(found), *_pictures(figures, "arms")]
    for hook in found.shown_hooks:
        lines += ["", f"### Ablations at {hook}", "", *_ablations(found, hook)]
    lines += ["", "## Evidence of the hierarchy", "", *evidence(found), *_pictures(figures, "evidence")]
    lines += ["", "## All other metrics", ""]
    for hook in found.shown_hooks:
        lines += [f"<details><summary>{hook}</summary>", "", *_others(found, hook), "", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def _pictures(figures: dict[str, str], kind: str) -> list[str]:
    shown = [f"![{name.replace('-', ' ')}]({path})" for name, path in figures.items() if name.startswith(kind)]
    return ["", *shown] if shown else []


def _made_from(found: Summary) -> list[str]:
    study, first = found.study, next(iter(found.records.values()))
    config: Config = next(iter(found.configs.values()))
    steps = sorted({record["steps"] for record in found.records.values() if "steps" in record})
    tokens = sorted({record["tokens"] for record in found.records.values() if "tokens" in record})
    text = first["text_sha256"]
    if config.corpus.heldout_path is None:
        text_hashes = f"{text['train'][:16]}, divided by document"
    else:
        text_hashes = ", ".join(f"{name} {value[:16]}" for name, value in text.items())
    devices = sorted({record["code"]["device"] for record in found.records.values()})
    parents = sorted({record["parents"] for record in found.records.values()})
    lines = [
        f"{config.model.title}, {listed([f'`{hook}`' for hook in found.shown_hooks])}; "
        f"{listed([f'{count:,}' for count in parents])} parents; every arm trained for "
        f"{listed([f'{count:,}' for count in steps])} steps of {config.training.batch_size:,} rows "
        f"({listed([f'{count:,}' for count in tokens])} rows); {HELD_OUT[found.split]} documents and words; "
        f"{counted(len(study.seeds), 'seed')} ({listed([str(seed) for seed in study.seeds])}); "
        f"{counted(len(found.records), 'record')} of {len(study.keys)}; {listed(devices)}.",
        "",
        "A seed changes a model's start, the order of its rows, and the control teachers. Documents, the folds of words"
        f" and the evidence are the same for all seeds (seed {config.run.seed}). Text (sha256): {text_hashes}. An"
        " interval is a 95 % bootstrap interval over concepts (FVU: over groups of documents), paired where arms are"
        " compared. *Over seeds*: a concept's values of all seeds are added up first, but for seeds where one of two"
        " arms has none; the interval then resamples concepts, and says nothing of how much seeds differ. PASS: the"
        " interval lies wholly beyond the threshold; FAIL: wholly short of it; INCONCLUSIVE: neither, or fewer than"
        f" {MIN_UNITS} concepts or groups of documents. Every metric is defined in docs/method.md, section 5. This page"
        " is written by `hsae findings write`, from the records alone.",
    ]
    if len({record["code"]["sources_sha256"] for record in found.records.values()}) > 1:
        lines += ["", "The records were made with more than one version of the code; each says which."]
    if found.left_out:
        lines += ["", f"Left out, because the study does not ask for them as they were made: {len(found.left_out)}."]
    return lines


def _in_short(found: Summary) -> list[str]:
    hooks = found.shown_hooks
    plans = {hook: found.study.plan(hook) for hook in hooks}
    held = [hook for hook in hooks if found.together(hook, plans[hook].teacher)]
    names = listed([TARGETS[target].name.lower() for target in TOGETHER])
    lines = [
        f"- **Together** ({names}, each PASS in each of {counted(len(found.study.seeds), 'seed')}): at {len(held)} of "
        f"{counted(len(hooks), 'hook')}{': ' + listed(held) if held else ''}; the aim is {AIM}, "
        f"which is {'met' if len(held) >= AIM else 'missed'}."
    ]
    pooled = [hook for hook in hooks if found.together_over_seeds(hook, plans[hook].teacher)]
    lines.append(f"- Together over seeds: at {len(pooled)} of {len(hooks)}{': ' + listed(pooled) if pooled else ''}.")
    judged = dict.fromkeys(plans[hook].teacher for hook in hooks)
    lines.append(f"- Judged: {'; '.join(f'`{arm}` ({_arm(found.study, arm)})' for arm in judged)}.")
    for target in TOGETHER:
        counts = []
        for hook in hooks:
            passed, of = found.passes(hook, plans[hook].teacher, target)
            over = {one["name"]: one for one in found.targets(hook, plans[hook].teacher, found.study.seeds)}
            counts.append(f"{hook} {passed} of {of} ({_units(over[target])})")
        lines.append(f"- {TARGETS[target].name}: seeds that pass at {'; '.join(counts)}.")
    lines += _all_rows(found)
    for hook in hooks:
        control = plans[hook].control
        if not found.seeds(hook, control):
            lines.append(f"- Permuted control at {hook}: not measured.")
            continue
        beyond = [target for target in OF_CONCEPTS if found.passes(hook, control, target)[0]]
        said = (
            "passes none of the targets on concepts in any seed, as it should"
            if not beyond
            else (
                "passes "
                + listed([f"{TARGETS[t].name.lower()} in {found.passes(hook, control, t)[0]}" for t in beyond])
                + f" of {counted(len(found.seeds(hook, control)), 'seed')}, which it should not"
            )
        )
        lines.append(f"- Permuted control ({control}) at {hook}: {said}.")
    return lines + decisions(found)


def _all_rows(found: Summary) -> list[str]:
    """How much leakage falls where a row on which no concept's latent is on counts as leaked, at every hook."""
    said = []
    for hook in found.shown_hooks:
        fall = found.fall(hook, found.study.plan(hook).teacher, "leakage_all_rows")
        if fall is not None and fall.value is not None:
            said.append(f"{hook} {number(100 * fall.value, 1)}{bounds(fall.ci95, 100, 1)} %")
    if not said:
        return []
    return [f"- Fall of leakage with rows on which no latent is on counted as leaked, over seeds: {'; '.join(said)}."]


def _targets_words(found: Summary) -> list[str]:
    arms = {hook: (found.study.plan(hook).teacher, found.study.plan(hook).control) for hook in found.shown_hooks}
    return [
        "Each arm against the one that it is compared with, on the same concepts and documents. Which arm is judged the"
        " study's file says: "
        + "; ".join(f"`{teacher}` (control `{control}`) at {hook}" for hook, (teacher, control) in arms.items())
        + ". In the figures a tick is a seed, a dot with its bar the value over seeds with its interval, green for"
        " PASS, orange for FAIL, grey for INCONCLUSIVE; a dashed line is a threshold. The angle is one number of the"
        " evidence, the same for every seed and arm, and it decides nothing alone. n is a union over seeds: all that"
        " have a value of both arms in at least one seed. In brackets each seed's own n, where they differ."
    ]


def _targets(found: Summary, hook: str) -> list[str]:
    plan = found.study.plan(hook)
    lines: list[str] = []
    for arm in (plan.teacher, plan.control):
        seeds = found.seeds(hook, arm)
        if not seeds:
            continue
        by_seed = [found.targets(hook, arm, [seed]) for seed in seeds]
        over = found.targets(hook, arm, seeds)
        rows = [
            [
                TARGETS[target["name"]].name,
                _required(target),
                *(_measured(targets[place]) for targets in by_seed),
                f"**{_measured(target)}**",
                _units(target) + _of_seeds(target["n"], [targets[place]["n"] for targets in by_seed]),
            ]
            for place, target in enumerate(over)
        ]
        header = [
            f"{arm} − {_against(found, hook, arm)}",
            "required",
            *(f"seed {seed}" for seed in seeds),
            "over seeds",
            "n over seeds",
        ]
        lines += ["", *markdown_table(header, rows)]
    return lines[1:]


def _of_seeds(over: int, by_seed: list[int]) -> str:
    """' (37, 38 and 36)': the units of every seed, where they are not those of the value over seeds."""
    return "" if set(by_seed) == {over} else f" ({listed([str(n) for n in by_seed])})"


def _against(found: Summary, hook: str, arm: str) -> str:
    """The arm that an arm is compared with, marked where their L0s are not matched."""
    return found.study.against(arm) + _mark(found, hook, arm)


def _mark(found: Summary, hook: str, arm: str) -> str:
    return UNMATCHED if found.l0_gap(hook, arm) else ""


def _required(target: dict[str, Any]) -> str:
    words = TARGETS[target["name"]]
    low, high = (None if bound is None else number(bound * words.factor, 0) for bound in target["required"])
    return f"≥ {low}{words.unit}" if high is None else f"{low} to {high}{words.unit}"


def _units(target: dict[str, Any]) -> str:
    """'54 concepts', or '100 groups of documents', as records keep them."""
    grouped = target["name"] == "reconstruction_parity"
    return f"{target['n']} groups of documents" if grouped else counted_units(target["name"], target["n"])


def _measured(target: dict[str, Any]) -> str:
    """'20.3 [12.6, 28.6] PASS' in the target's unit."""
    words = TARGETS[target["name"]]
    if target["measured"] is None:
        return f"{DASH} {target['verdict']}"
    less = target["name"] == "reconstruction_parity" and target["verdict"] == FAIL and target["measured"] < 0
    return f"{_with_interval(target, words)} {'LESS' if less else target['verdict']}"


def _with_interval(target: dict[str, Any], words: TargetWords) -> str:
    value = number(target["measured"] * words.factor, words.digits)
    if target["ci95"] is None:
        return value
    low, high = (number(bound * words.factor, words.digits) for bound in target["ci95"])
    return f"{value} [{low}, {high}]"


def _missed(found: Summary) -> list[str]:
    lines = []
    for hook in found.shown_hooks:
        plan = found.study.plan(hook)
        for place, target in enumerate(found.targets(hook, plan.teacher, found.seeds(hook, plan.teacher))):
            passed, of = found.passes(hook, plan.teacher, target["name"])
            if passed < of or not of:
                lines.append(_reason(found, hook, place, target, passed, of))
    return lines or ["Nothing: every target passes at every hook in every seed."]


def _reason(found: Summary, hook: str, place: int, target: dict[str, Any], passed: int, of: int) -> str:
    plan, words = found.study.plan(hook), TARGETS[target["name"]]
    said = f"- **{words.name} at {hook}**: PASS in {passed} of {counted(of, 'seed')}; over seeds {_measured(target)}, "
    said += f"required {_required(target)}. "
    if target["measured"] is None:
        return f"{said}Not measured: {target.get('why', 'no reason is recorded')}."
    low, high = target["required"]
    inside = (low is None or target["measured"] >= low) and (high is None or target["measured"] <= high)
    if "why" in target:
        said += f"Not decided: {target['why']}."
    elif inside and target["verdict"] == PASS:
        said += "Over seeds it passes, but not in every seed."
    elif inside:
        said += f"The estimate meets the threshold; the interval over {_units(target)} reaches beyond it."
    else:
        said += "The estimate itself falls short."
    if metric := _METRIC.get(target["name"]):
        arms = (found.study.against(plan.teacher), plan.teacher, plan.control)
        values = [f"{arm} {_mean(found.over_seeds(hook, arm, metric))}" for arm in arms]
        chance = found.chance(hook, metric)
        said += f" {metric}: {', '.join(values)}" + (f", chance {_mean(chance)}." if chance else ".")
    if target["name"] == "steering_leakage_reduction":
        unreached = found.over_seeds(hook, plan.teacher, "steering_unreached")
        said += f" Share of concepts whose effect is not reached by the arm: {_mean(unreached)}; they have no value."
    best = _best(found, hook, place)
    return said + (f" Largest of the arms with that baseline: {best}." if best else "")


_METRIC = {
    "purity_gain_pp": "purity",
    "leakage_reduction": "leakage",
    "steering_leakage_reduction": "steering_leakage",
    "reconstruction_parity": "fvu",
}


def _best(found: Summary, hook: str, place: int) -> str:
    """The best arm on a target whose required values are open above, of those with the judged arm's baseline."""
    values = {}
    baseline = found.study.against(found.study.plan(hook).teacher)
    for arm in found.arms(hook):
        if found.study.against(arm) == baseline != arm:
            target = found.targets(hook, arm, found.seeds(hook, arm))[place]
            if target["measured"] is not None and target["required"][1] is None:
                values[arm] = target
    if not values:
        return ""
    arm = max(values, key=lambda name: float(values[name]["measured"]))
    return f"`{arm}`{_mark(found, hook, arm)} with {_measured(values[arm])}"


def _arms(study: Findings) -> list[str]:
    """What every arm is, as the study's file has it, and what all arms have."""
    common = [f"`{key}` {value}" for key, value in study.set.items() if key.startswith(("hsae.", "teacher."))]
    of_hooks = [
        f"{plan.hook}: {', '.join(f'`{key}` {value}' for key, value in plan.set.items())}"
        for plan in study.hooks
        if plan.set
    ]
    said = f"The packaged config `{study.config}`" + (f", but {', '.join(common)}" if common else "")
    said += f"; at {'; at '.join(of_hooks)}" if of_hooks else ""
    rows = [[arm.name, _arm(study, arm.name)] for arm in study.arms]
    return [
        f"{said}. What an arm has beside or instead of it:",
        "",
        *markdown_table(["arm", "what it is"], rows, numbers=False),
    ]


def _arm(study: Findings, name: str) -> str:
    """An arm's kind or start, and the fields that it replaces."""
    arm = study.arm(name)
    if arm.kind != "hsae":
        said = f"flat, {arm.kind}"
    else:
        said = "random start" if arm.init == "random" else f"starts from the {arm.init.replace('_', ' ')}"
    if arm.stages is not None:
        said += f", in the stages of {arm.stages}"
    for block, fields in (("teacher", arm.teacher), ("hsae", arm.hsae), ("flat", arm.flat), ("match", arm.match)):
        if fields:
            said += f"; {block}: {', '.join(f'{key} {value}' for key, value in fields.items())}"
    other = study.against(name)
    return said if other in (name, study.arms[0].name) else f"{said}; against {other}"


def _ablation_words(found: Summary) -> list[str]:
    return [
        "Mean ± standard deviation over seeds. The last columns are against the arm named in the second one: the value"
        " over seeds with its interval and verdict; LESS: less error than the target asks about. Zero sum rows: those"
        f" on which no concept's latent is on, which leakage leaves out.{UNMATCHED}: not at matched L0, the arms'"
        f" differ by more than {TOLERANCE:.0%}; part of what differs in EV, CE and FVU is due to that."
    ]


def _ablations(found: Summary, hook: str) -> list[str]:
    names = [name for name in found.metric_names if name in found.study.shown]
    header = ["arm", "against", *(name.replace("_", " ") for name in names)]
    header += [TARGETS[target].name.lower() for target in TOGETHER] + ["seeds"]
    rows = []
    for arm in found.arms(hook):
        other, seeds = found.study.against(arm), found.seeds(hook, arm)
        row = [
            arm,
            DASH if other == arm else _against(found, hook, arm),
            *(_shown(found.over_seeds(hook, arm, name)) for name in names),
        ]
        targets = [] if other == arm else found.targets(hook, arm, seeds)
        row += [_measured(target) for target in targets if target["name"] in TOGETHER] or [DASH] * len(TOGETHER)
        rows.append([*row, str(len(seeds))])
    chances = ["chance", "", *(_mean(found.chance(hook, name)) for name in names)]
    rows.append([*chances, *[""] * (len(header) - len(chances))])
    return [*markdown_table(header, rows), *_unmatched(found, hook)]


def _unmatched(found: Summary, hook: str) -> list[str]:
    """Which arms are not compared at matched L0, and how far they are from it."""
    said = [
        f"{arm} {_mean(found.over_seeds(hook, arm, 'l0'), 1)} against"
        f" {_mean(found.over_seeds(hook, found.study.against(arm), 'l0'), 1)} ({number(100 * gap, 0, sign=True)} %)"
        for arm in found.arms(hook)
        if (gap := found.l0_gap(hook, arm))
    ]
    return ["", f"Not at matched L0: {'; '.join(said)}."] if said else []


def _others(found: Summary, hook: str) -> list[str]:
    """Every other metric, a row each: new ones appear by themselves."""
    arms = found.arms(hook)
    rows = []
    for name in found.metric_names:
        if name not in found.study.shown:
            cells = [_shown(found.over_seeds(hook, arm, name)) for arm in arms]
            rows.append([name.replace("_", " "), _mean(found.chance(hook, name)), *cells])
    return markdown_table(["metric", "chance", *arms], rows)


def _shown(over: Spread | None) -> str:
    if over is None:
        return DASH
    return number(over.mean) if over.sd is None else f"{number(over.mean)} ± {number(over.sd)}"


def _mean(over: Spread | None, digits: int = 3) -> str:
    return DASH if over is None else number(over.mean, digits)
