"""The tables of a sweep with a teacher: targets, arms, ablations and the evidence of the hierarchy at every hook."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..evaluation.targets import MIN_UNITS, counted_units
from ..geometry.controls import METRICS
from ..report.words import DASH, TARGETS, counted, listed, markdown_table, number
from .columns import SPLITS, UNMATCHED, devices, mean_text, of_versions, shown
from .plan import Sweep
from .summary import FAIL, OF_CONCEPTS, TOGETHER, TOLERANCE, Result, Results, spread, variants


def tables(results: Results) -> list[str]:
    """The targets of every hook, every arm by every metric, and the evidence of the hierarchy."""
    lines = [f"# Study {results.sweep.name}", "", *made_from(results), "", "## Arms", "", *_arms(results)]
    for hook in results.shown_hooks:
        lines += ["", f"## Targets at {hook}", "", *targets(results, hook)]
    lines += ["", "## Ablations", "", ABLATION_WORDS]
    for hook in results.shown_hooks:
        lines += ["", f"### Ablations at {hook}", "", *_ablations(results, hook)]
    lines += ["", "## Evidence of the hierarchy", "", *_evidence(results), "", "## All other metrics", ""]
    for hook in results.shown_hooks:
        lines += [f"### All other metrics at {hook}", "", *_others(results, hook), ""]
    return lines


def made_from(results: Results) -> list[str]:
    """What a sweep's numbers are of, in a paragraph, and how they are to be read in another."""
    sweep, records = results.sweep, results.runs.values()
    config, first = next(iter(results.configs.values())), next(iter(records))
    steps, tokens, parents = (
        listed([f"{count:,}" for count in sorted({record[name] for record in records if name in record})])
        for name in ("steps", "tokens", "parents")
    )
    text = first["text_sha256"]
    hashes = ", ".join(f"{name} {value[:16]}" for name, value in text.items())
    if config.corpus.heldout_path is None:
        hashes = f"{text['train'][:16]}, divided by document"
    return [
        f"{config.model.title}, {listed([f'`{hook}`' for hook in results.shown_hooks])}; {parents} parents; every arm"
        f" trained for {steps} steps of {config.training.batch_size:,} rows ({tokens} rows); {SPLITS[results.split]}"
        f" documents and words; {counted(len(sweep.seeds), 'seed')} ({listed([str(seed) for seed in sweep.seeds])});"
        f" {counted(len(records), 'run')}; {devices(results)}.",
        "",
        "A seed changes a model's start, the order of its rows, and the control teachers. Documents, folds of words and"
        f" the evidence are those of seed {config.run.seed}. Text (sha256): {hashes}. An interval is a 95 % bootstrap"
        " interval over concepts (FVU: over groups of documents), paired where arms are compared. *Over seeds*: a"
        " concept's values of all seeds are added up first; the interval resamples concepts and does not show how much"
        " seeds differ. PASS: the interval lies wholly beyond the threshold. FAIL: wholly short of it. INCONCLUSIVE:"
        f" neither, or fewer than {MIN_UNITS} concepts or groups of documents. Metrics: docs/method.md, section 5.",
        *of_versions(results),
    ]


def targets(results: Results, hook: str) -> list[str]:
    """A table of the five targets for the judged arm and one for its control, by seed and over seeds."""
    plan, lines = results.sweep.plan(hook), []
    for found in (results.arm(hook, plan.teacher), results.arm(hook, plan.control)):
        if found is None:
            continue
        seeds = list(found.records)
        by_seed, over = [results.targets(found, [seed]) for seed in seeds], results.targets(found, seeds)
        rows = [
            [
                TARGETS[target["name"]].name,
                required(target),
                *(measured(targets[place]) for targets in by_seed),
                f"**{measured(target)}**",
                units(target) + _of_seeds(target["n"], [targets[place]["n"] for targets in by_seed]),
            ]
            for place, target in enumerate(over)
        ]
        header = [f"{found.cell.arm} − {against(results, found)}", "required", *(f"seed {seed}" for seed in seeds)]
        lines += ["", *markdown_table([*header, "over seeds", "n over seeds"], rows)]
    return lines[1:]


def _of_seeds(over: int, by_seed: list[int]) -> str:
    """' (37, 38 and 36)': the units of every seed, where they are not those of the value over seeds."""
    return "" if set(by_seed) == {over} else f" ({listed([str(n) for n in by_seed])})"


def against(results: Results, result: Result) -> str:
    """The arm that one is compared with, marked where their L0s are not matched."""
    return results.sweep.against(result.cell.arm) + (UNMATCHED if results.l0_gap(result) else "")


def required(target: dict[str, Any]) -> str:
    """'≥ 10 points', or a band."""
    words = TARGETS[target["name"]]
    low, high = (None if bound is None else number(bound * words.factor, 0) for bound in target["required"])
    return f"≥ {low}{words.unit}" if high is None else f"{low} to {high}{words.unit}"


def units(target: dict[str, Any]) -> str:
    """'54 concepts', or '100 groups of documents', as records keep them."""
    grouped = target["name"] == "reconstruction_parity"
    return f"{target['n']} groups of documents" if grouped else counted_units(target["name"], target["n"])


def measured(target: dict[str, Any]) -> str:
    """'20.3 [12.6, 28.6] PASS' in the target's unit; LESS: less error than the target asks about."""
    words = TARGETS[target["name"]]
    if target["measured"] is None:
        return f"{DASH} {target['verdict']}"
    less = target["name"] == "reconstruction_parity" and target["verdict"] == FAIL and target["measured"] < 0
    value = number(target["measured"] * words.factor, words.digits)
    return f"{value}{bounds(target['ci95'], words.factor, words.digits)} {'LESS' if less else target['verdict']}"


def bounds(ci95: Sequence[float] | None, factor: float = 1.0, digits: int = 3) -> str:
    """' [0.12, 0.34]', to stand behind a value; nothing where there is no interval."""
    if ci95 is None:
        return ""
    low, high = (number(bound * factor, digits) for bound in ci95)
    return f" [{low}, {high}]"


def _arms(results: Results) -> list[str]:
    """What every arm is, as the sweep's file has it, and what all arms have."""
    sweep = results.sweep
    common = [f"`{key}` {value}" for key, value in sweep.set.items() if key.startswith(("hsae.", "teacher."))]
    of_hooks = [
        f"{plan.hook}: {', '.join(f'`{key}` {value}' for key, value in plan.set.items())}"
        for plan in sweep.hooks
        if plan.set
    ]
    said = f"The packaged config `{sweep.config}`" + (f", but {', '.join(common)}" if common else "")
    said += f"; at {'; at '.join(of_hooks)}" if of_hooks else ""
    rows = [[arm.name, arm_words(sweep, arm.name)] for arm in sweep.arms]
    return [
        f"{said}. What an arm has beside or instead of it:",
        "",
        *markdown_table(["arm", "what it is"], rows, False),
    ]


def arm_words(sweep: Sweep, name: str) -> str:
    """An arm's kind or start, and the fields that it replaces."""
    arm = sweep.arm(name)
    if arm.kind != "hsae":
        said = f"flat, {arm.kind}"
    else:
        said = "random start" if arm.init == "random" else f"starts from the {arm.init.replace('_', ' ')}"
    if arm.stages is not None:
        said += f", in the stages of {arm.stages}"
    for block, fields in (("teacher", arm.teacher), ("hsae", arm.hsae), ("flat", arm.flat), ("match", arm.match)):
        if fields:
            said += f"; {block}: {', '.join(f'{key} {value}' for key, value in fields.items())}"
    other = sweep.against(name)
    return said if other in (name, sweep.arms[0].name) else f"{said}; against {other}"


ABLATION_WORDS = (
    "Mean ± standard deviation over seeds. The last columns are against the arm named in the second one: the value over"
    " seeds with its interval and verdict; LESS: less error than the target asks about. No-fire rate: rows on which no"
    f" concept's latent is on, which leakage leaves out.{UNMATCHED}: not at matched L0, the arms' differ by more than"
    f" {TOLERANCE:.0%}; part of what differs in EV, CE and FVU is due to that."
)


def _ablations(results: Results, hook: str) -> list[str]:
    names = [name for name in results.metric_names if name in results.sweep.shown]
    header = ["arm", "against", *(name.replace("_", " ") for name in names)]
    header += [TARGETS[target].within for target in TOGETHER] + ["seeds"]
    rows, gaps = [], []
    for found in results.at(hook):
        itself = results.sweep.against(found.cell.arm) == found.cell.arm
        judged = [] if itself else results.targets(found, list(found.records))
        row = [found.cell.arm, DASH if itself else against(results, found)]
        row += [shown(found.metric(name), 3) for name in names]
        row += [measured(target) for target in judged if target["name"] in TOGETHER] or [DASH] * len(TOGETHER)
        rows.append([*row, str(len(found.records))])
        gap, other = results.l0_gap(found), results.other(found)
        if gap and other is not None:
            l0, l0_other = (mean_text(one.metric("l0"), 1) for one in (found, other))
            gaps.append(f"{found.cell.arm} {l0} against {l0_other} ({number(100 * gap, 0, sign=True)} %)")
    chances = ["chance", "", *(chance(results, hook, name) for name in names)]
    rows.append([*chances, *[""] * (len(header) - len(chances))])
    return [*markdown_table(header, rows), *(["", f"Not at matched L0: {'; '.join(gaps)}."] if gaps else [])]


def chance(results: Results, hook: str, name: str) -> str:
    """The mean chance level of a metric over arms and seeds."""
    levels = [
        level
        for found in results.at(hook)
        for level in found.numbers(results.split, "metrics", name, "chance").values()
    ]
    return mean_text(spread(levels))


def _others(results: Results, hook: str) -> list[str]:
    """Every other metric, a row each: new ones appear by themselves."""
    arms = results.at(hook)
    rows = [
        [name.replace("_", " "), chance(results, hook, name), *(shown(found.metric(name), 3) for found in arms)]
        for name in results.metric_names
        if name not in results.sweep.shown
    ]
    return markdown_table(["metric", "chance", *(found.cell.arm for found in arms)], rows)


Blocks = dict[str, dict[str, str]]  # texts of the evidence's numbers by their name, for the hierarchy and every control


def _evidence(results: Results) -> list[str]:
    """The evidence of every hook; once for hooks of which one has all that another has."""
    lines: list[str] = []
    distinct: list[tuple[Blocks, list[str]]] = []
    of_hook = {hook: _blocks(results.evidence(hook)) for hook in results.shown_hooks}
    for hook, blocks in sorted(of_hook.items(), key=lambda item: -len(item[1])):
        same = next((hooks for larger, hooks in distinct if blocks.items() <= larger.items()), None)
        if same is not None:
            same.append(hook)
        elif blocks:
            distinct.append((blocks, [hook]))
    for blocks, (first, *others) in distinct:
        names = list(next(iter(blocks.values())))
        rows = [[name.replace("_", " "), *(numbers.get(name, DASH) for numbers in blocks.values())] for name in names]
        lines += [f"At {first}{f'; {listed(others)} have the same' if others else ''}:", ""]
        lines += [*markdown_table(["", *(name.replace("_", " ") for name in blocks)], rows), ""]
    return lines[:-1] if lines else ["Not there: hooks.json is missing."]


def _blocks(evidence: dict[str, Any]) -> Blocks:
    found = {name: dict(_numbers(block)) for name, block in variants(evidence).items()}
    return {name: numbers for name, numbers in found.items() if set(numbers.values()) != {DASH}}


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


def decisions(results: Results) -> list[str]:
    """What the decision of phase 1 says of the hierarchy and of its controls, once for the hooks that agree."""
    said: dict[str, list[str]] = {}
    for hook in results.shown_hooks:
        blocks = variants(results.evidence(hook))
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


# what the page says


def summary(results: Results) -> list[str]:
    """Where the targets pass together, the tables of targets, and what is missed by how much."""
    lines = [*made_from(results), "", *_in_short(results)]
    for hook in results.shown_hooks:
        lines += ["", f"### Targets at {hook}", "", *targets(results, hook)]
    return [*lines, "", "### What is missed, and by how much", "", *_missed(results)]


def _judged(results: Results) -> dict[str, Result]:
    """The judged arm's result at every hook that has one."""
    found = {hook: results.arm(hook, results.sweep.plan(hook).teacher) for hook in results.shown_hooks}
    return {hook: result for hook, result in found.items() if result is not None}


def _in_short(results: Results) -> list[str]:
    judged = _judged(results)
    names = listed([TARGETS[target].within for target in TOGETHER])
    held = [hook for hook, result in judged.items() if results.together(result)]
    over = [hook for hook, result in judged.items() if results.together_over_seeds(result)]
    arms = dict.fromkeys(result.cell.arm for result in judged.values())
    lines = [
        f"- **Together** ({names}, each PASS in each of {counted(len(results.sweep.seeds), 'seed')}): at {len(held)} of"
        f" {counted(len(judged), 'hook')}{': ' + listed(held) if held else ''}. Over seeds: at"
        f" {len(over)}{': ' + listed(over) if over else ''}.",
        f"- Judged: {'; '.join(f'`{arm}` ({arm_words(results.sweep, arm)})' for arm in arms)}.",
    ]
    for target in TOGETHER:
        counts = ["{} {} of {}".format(hook, *results.passes(result, target)) for hook, result in judged.items()]
        lines.append(f"- {TARGETS[target].name}: seeds that pass at {'; '.join(counts)}.")
    falls = {hook: results.fall(result, "leakage_all_rows") for hook, result in judged.items()}
    said = [
        f"{hook} {number(100 * fall.value, 1)}{bounds(fall.ci95, 100, 1)} %"
        for hook, fall in falls.items()
        if fall is not None and fall.value is not None
    ]
    if said:
        rows = "rows on which no concept's latent is on"
        lines.append(f"- Leakage reduction with {rows} counted as leaked, over seeds: {'; '.join(said)}.")
    return lines + [_control(results, hook) for hook in judged] + decisions(results)


def _control(results: Results, hook: str) -> str:
    """Whether the control fails, as it should."""
    name = results.sweep.plan(hook).control
    found = results.arm(hook, name)
    if found is None:
        return f"- Permuted control at {hook}: not measured."
    passed = {target: results.passes(found, target)[0] for target in OF_CONCEPTS}
    beyond = [f"{TARGETS[target].within} in {count}" for target, count in passed.items() if count]
    said = "passes none of the targets on concepts in any seed, as it should"
    if beyond:
        said = f"passes {listed(beyond)} of {counted(len(found.records), 'seed')}, which it should not"
    return f"- Permuted control ({name}) at {hook}: {said}."


def _missed(results: Results) -> list[str]:
    lines = []
    for hook, result in _judged(results).items():
        for place, target in enumerate(results.targets(result, list(result.records))):
            passed, of = results.passes(result, target["name"])
            if passed < of or not of:
                lines.append(_reason(results, hook, result, place, f"PASS in {passed} of {counted(of, 'seed')}"))
    return lines or ["Nothing: every target passes at every hook in every seed."]


def _reason(results: Results, hook: str, result: Result, place: int, seeds: str) -> str:
    target = results.targets(result, list(result.records))[place]
    words = TARGETS[target["name"]]
    said = f"- **{words.name} at {hook}**: {seeds}; over seeds {measured(target)}, required {required(target)}. "
    if target["measured"] is None:
        return f"{said}Not measured: {target.get('why', 'no reason is recorded')}."
    low, high = target["required"]
    inside = (low is None or target["measured"] >= low) and (high is None or target["measured"] <= high)
    if "why" in target:
        said += f"Not decided: {target['why']}."
    elif inside and target["verdict"] == "PASS":
        said += "Over seeds it passes, but not in every seed."
    elif inside:
        said += f"The estimate meets the threshold; the interval over {units(target)} reaches beyond it."
    else:
        said += "The estimate itself falls short."
    if target["name"] == "steering_leakage_reduction":
        unreached = mean_text(result.metric("steering_unreached"))
        said += f" Share of concepts whose effect is not reached by the arm: {unreached}; they have no value."
    best = _best(results, result, place)
    return said + (f" Largest of the arms with that baseline: {best}." if best else "")


def _best(results: Results, judged: Result, place: int) -> str:
    """The best arm on a target whose required values are open above, of those with the judged arm's baseline."""
    baseline, values = results.sweep.against(judged.cell.arm), {}
    for found in results.at(judged.cell.hook):
        if results.sweep.against(found.cell.arm) == baseline != found.cell.arm:
            target = results.targets(found, list(found.records))[place]
            if target["measured"] is not None and target["required"][1] is None:
                values[found.cell.arm + (UNMATCHED if results.l0_gap(found) else "")] = target
    if not values:
        return ""
    arm = max(values, key=lambda name: float(values[name]["measured"]))
    return f"`{arm}` with {measured(values[arm])}"
