"""The header's paragraph: what the run found, computed from its results."""

from typing import Any

from ..evaluation.massive import MASSIVE
from ..evaluation.targets import MIN_UNITS, counted_units
from .read import RunFiles
from .targets import informative_passes
from .words import DASH, TARGETS, arm_title, interval, listed, number, percent

WORDS = 5  # of the tokens of massive rows
LINE_BREAK = "\n"
LEFT_OUT = (
    "They are left out of training and of every metric below, but for those marked “all rows”. In the language model "
    "their reconstruction is put in place like any other's, but where “massive rows kept” is said."
)
LEFT_IN = (
    "This run trains on them and counts them, so explained variance rests on a handful of rows (“explained variance of "
    f"a row” does not). data.max_norm_multiple={MASSIVE:g} leaves them out."
)


def summary(run: RunFiles) -> list[str]:
    """The header's sentences, the verdicts first; a sentence without its numbers is left out."""
    sentences = [_verdict_sentence(run)]
    angle = run.target("median_angle_deg")
    controls = [value for value in angle["controls"].values() if value is not None]
    if controls and all(angle["required"][0] <= value <= angle["required"][1] for value in controls):
        sentences.append("The angle decides nothing: its controls, in which there is no hierarchy, are in range too.")
    main = run.evidence["main"]
    if main["fraction_z_above_3"] is not None:
        count = sum(value is not None for value in main["parents"]["z"])
        shares = {
            name: run.evidence[key]["fraction_z_above_3"]
            for key, name in (("pseudo_parents", "of made-up parents"), ("shuffled_rows", "after shuffling the rows"))
        }
        elsewhere = listed([f"{percent(share)} {name}" for name, share in shares.items() if share is not None] or ["–"])
        share = percent(main["fraction_z_above_3"])
        sentences.append(
            f"In the {run.evidence['rows_of']}, the children of {share} of {count} parents share a direction beyond "
            f"what random nouns share (z above 3); the same holds for {elsewhere}."
        )
    purity = {arm: found for arm in run.key_arms if (found := run.metric(arm, "purity"))}
    if purity:
        known = [f"{number(found['value'], 2)} ({arm_title(arm)})" for arm, found in purity.items()]
        chance = next(iter(purity.values()))["chance"]
        sentences.append(f"On held-out words, purity is {listed(known)}; chance is {number(chance, 2)}.")
    leads = [
        f"{number(100 * found['value'], 1, sign=True)} points over {arm_title(arm)} ({interval(found['ci95'], 1, 100)})"
        for arm in run.key_arms
        if arm not in run.judged and (found := run.lead(arm, "purity"))
    ]
    if leads:
        sentences.append(f"Paired by concept, the teacher's lead in purity is {listed(leads)}.")
    if explained := _of_arms(run, "ev"):
        sentences.append(f"Explained variance: {explained}.")
    seeds = listed([str(seed) for seed in run.results["seeds"]])
    sentences.append(f"Seed {seeds}: the intervals are over concepts and documents, not over training runs.")
    return sentences


def _of_arms(run: RunFiles, metric: str) -> str:
    """'0.858 (baseline) and 0.855 (teacher)'; empty where no arm has the metric."""
    found = {arm: measured for arm in run.key_arms if (measured := run.metric(arm, metric))}
    return listed([f"{number(one['value'], 3)} ({arm_title(arm)})" for arm, one in found.items()]) if found else ""


def massive_rows(run: RunFiles) -> list[str]:
    """What rows of massive norm there are and what they do to the numbers; empty where there are none."""
    norms = run.norms
    found = {} if norms is None else {name: one for name, one in norms["splits"].items() if one["massive"]}
    if norms is None or not found:
        return []
    counts = [
        f"{one['massive']:,} of {one['rows']:,} {name} rows ({percent(one['massive'] / one['rows'], 3)})"
        for name, one in found.items()
    ]
    times, median = f"{norms['limit'] or MASSIVE:g} times", number(norms["median_norm"], 1)
    largest = number(max(one["largest_norm"] for one in found.values()), 0)
    tokens = next(iter(found.values()))["tokens"][:WORDS]
    words = [
        f"{'a line break' if token.strip(' ') == LINE_BREAK else f'“{token}”'} ({count:,})" for token, count in tokens
    ]
    share = percent(max(one["share_of_squared_deviation"] for one in found.values()))
    with_them = _of_arms(run, "ev_all_rows") if norms["limit"] else ""
    return [
        f"{listed(counts)} have a norm above {times} the median of {median}, up to {largest}. In language models these "
        "are usually a text's first tokens and its first commas, full stops and line breaks (“massive activations”); "
        f"here most often {listed(words or [DASH])}.",
        f"They hold {share} of the squared deviation from the mean, so an explained variance with them says little "
        f"about all other rows{f': with them it would be {with_them}' if with_them else ''}.",
        LEFT_OUT if norms["limit"] else LEFT_IN,
    ]


def _verdict_sentence(run: RunFiles) -> str:
    targets = run.results["targets"]
    parts = []
    for verdict, one, several in (
        ("PASS", "passes", "pass"),
        ("FAIL", "fails", "fail"),
        ("INCONCLUSIVE", "is undecided", "are undecided"),
    ):
        names = [_over(target) for target in targets if target["verdict"] == verdict]
        if names:
            parts.append(f"{len(names)} {one if len(names) == 1 else several} ({listed(names)})")
    said = f"Of {len(targets)} targets, {listed(parts)}."
    if any(target["n"] < MIN_UNITS for target in targets):
        said += f" Fewer than {MIN_UNITS} decide nothing."
    passes, informative = (sum(target["verdict"] == "PASS" for target in targets), informative_passes(run))
    return said if informative == passes else f"{said} Informative: {informative} of the {passes} that pass."


def _over(target: dict[str, Any]) -> str:
    """'gain of purity over 16 concepts'."""
    name = TARGETS[target["name"]].name
    return f"{name[0].lower()}{name[1:]} over {counted_units(target['name'], target['n'])}"
