"""Sentences computed from a run's results: the header's, those on massive activations, those on the hierarchy."""

from typing import Any

from ..evaluation.massive import MASSIVE
from ..evaluation.targets import MIN_UNITS, counted_units
from .read import RunFiles
from .targets import informative_passes
from .words import DASH, TARGETS, arm_title, interval, listed, number, percent

WORDS = 5  # of the tokens of massive rows
LEFT_OUT = (
    "Training and every metric below leave them out, except metrics marked “all rows”. In the language model their "
    "reconstruction is spliced in like any other's, except where “massive rows kept” is said."
)
LEFT_IN = (
    "This run trains on them and counts them, so explained variance rests on a handful of rows (“EV, mean over rows” "
    f"does not). data.max_norm_multiple={MASSIVE:g} leaves them out."
)
GREEK = {"omega": "ω", "kappa": "κ", "beta": "β"}


def summary(run: RunFiles) -> list[str]:
    """The header's sentences, the verdicts first; a sentence without its numbers is left out."""
    sentences = [_verdict_sentence(run), *_decision(run)]
    purity = {arm: found for arm in run.key_arms if (found := run.metric(arm, "purity"))}
    if purity:
        known = [f"{number(found['value'], 2)} ({arm_title(arm)})" for arm, found in purity.items()]
        chance = next(iter(purity.values()))["chance"]
        sentences.append(f"Purity on held-out words: {listed(known)}; chance level {number(chance, 2)}.")
    leads = [
        f"{number(100 * found['value'], 1, sign=True)} points over {arm_title(arm)} ({interval(found['ci95'], 1, 100)})"
        for arm in run.key_arms
        if arm not in run.judged and (found := run.lead(arm, "purity"))
    ]
    if leads:
        sentences.append(f"The teacher's lead in purity, paired by concept: {listed(leads)}.")
    explained = [f"{number(ev['value'])} ({arm_title(arm)})" for arm in run.key_arms if (ev := run.metric(arm, "ev"))]
    if explained:
        sentences.append(f"Explained variance: {listed(explained)}.")
    seeds = listed([str(seed) for seed in run.results["seeds"]])
    sentences.append(f"Seed {seeds}: the intervals are over concepts and documents, not over training runs.")
    return sentences


def hierarchy(run: RunFiles) -> list[str]:
    """Whether a hierarchy with orthogonal differences is shown, and how many trained children follow it."""
    return [*_decision(run), *_trained(run)]


def massive_rows(run: RunFiles) -> list[str]:
    """How many rows have a massive norm and what they do to the numbers; empty where there are none."""
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
        f"{'a line break' if token.strip(' ') == chr(10) else f'“{token}”'} ({count:,})" for token, count in tokens
    ]
    share = percent(max(one["share_of_squared_deviation"] for one in found.values()))
    return [
        f"{listed(counts)} have a norm above {times} the median of {median}, up to {largest}. "
        f"Most frequent tokens: {listed(words or [DASH])}.",
        f"They hold {share} of the squared deviation from the mean, so explained variance with them says little "
        "about all other rows.",
        LEFT_OUT if norms["limit"] else LEFT_IN,
    ]


def _verdict_sentence(run: RunFiles) -> str:
    targets = run.results["targets"]
    parts = []
    for verdict, one, several in (
        ("PASS", "passes", "pass"),
        ("FAIL", "fails", "fail"),
        ("INCONCLUSIVE", "is inconclusive", "are inconclusive"),
    ):
        names = [_over(target) for target in targets if target["verdict"] == verdict]
        if names:
            parts.append(f"{len(names)} {one if len(names) == 1 else several} ({listed(names)})")
    said = f"Of {len(targets)} targets, {listed(parts)}."
    if any(target["n"] < MIN_UNITS for target in targets):
        said += f" Fewer than {MIN_UNITS} units give no verdict."
    passes, informative = (sum(target["verdict"] == "PASS" for target in targets), informative_passes(run))
    return said if informative == passes else f"{said} Informative: {informative} of the {passes} that pass."


def _over(target: dict[str, Any]) -> str:
    """'purity gain over 16 concepts'."""
    name = TARGETS[target["name"]].within
    return f"{name} over {counted_units(target['name'], target['n'])}"


def _decision(run: RunFiles) -> list[str]:
    """The decision at a stated level, all tests of which must pass; runs of earlier versions have none."""
    found = run.evidence["main"].get("decision")
    if found is None:
        return []
    said = f"A hierarchy with orthogonal differences is {'' if found['hierarchy'] else 'not '}shown at level"
    said += f" {found['alpha']:g}."
    for verb, passes in (("Passed", True), ("Not passed", False)):
        names = [
            GREEK.get(name, name.replace("_", " ")) for name, test in found["tests"].items() if test["passes"] is passes
        ]
        if names:
            said += f" {verb}: {listed(names)}."
    return [said + (f" Not tested: {found['why']}." if "why" in found else "")]


def _trained(run: RunFiles) -> list[str]:
    found = {arm: one for arm in run.arms if (one := run.metric(arm, "edge_recall"))}
    if not found:
        return []
    shares = listed([f"{percent(one['value'])} ({arm_title(arm)})" for arm, one in found.items()])
    chance = percent(next(iter(found.values()))["chance"])
    return [
        "After training, child concepts whose best latent is a child of their parent's latent: "
        f"{shares}; chance level {chance}."
    ]
