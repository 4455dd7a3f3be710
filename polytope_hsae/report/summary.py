"""The header's paragraph: what the run found, computed from its results."""

from .read import RunFiles
from .targets import informative_passes
from .words import TARGETS, arm_title, counted, interval, listed, number, percent


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
    permuted = run.arm_with(init="permuted_teacher")
    flat = run.arm_with(kind="topk")
    others = [arm for arm in (flat, permuted) if arm]
    purity = {arm: run.metric(arm, "purity") for arm in ("teacher", "baseline", *others)}
    known = [f"{number(found['value'], 2)} ({arm_title(arm)})" for arm, found in purity.items() if found]
    chance = next((found["chance"] for found in purity.values() if found), None)
    if known:
        on_words = f"On words held out from the teacher, purity is {listed(known)}"
        sentences.append(f"{on_words}; chance is {number(chance, 2)}.")
    leads = [
        f"{number(100 * found['value'], 1, sign=True)} points over {arm_title(arm)} ({interval(found['ci95'], 1, 100)})"
        for arm in others
        if (found := run.lead(arm, "purity"))
    ]
    if leads:
        sentences.append(f"Paired by concept, the teacher's lead in purity is {listed(leads)}.")
    ev = {arm: run.metric(arm, "ev") for arm in ("teacher", "baseline", *([flat] if flat else []))}
    known = [f"{number(found['value'], 3)} ({arm_title(arm)})" for arm, found in ev.items() if found]
    if known:
        sentences.append(f"Explained variance: {listed(known)}.")
    seeds = counted(len(run.results["seeds"]), "seed")
    sentences.append(f"{seeds}: the intervals are over concepts and documents, not over training runs.")
    return sentences


def _verdict_sentence(run: RunFiles) -> str:
    targets = run.results["targets"]
    parts = []
    for verdict, says in (("PASS", "pass"), ("FAIL", "fail"), ("INCONCLUSIVE", "are undecided")):
        names = [TARGETS[target["name"]].name.lower() for target in targets if target["verdict"] == verdict]
        if names:
            verb = (
                {"pass": "passes", "fail": "fails", "are undecided": "is undecided"}[says] if len(names) == 1 else says
            )
            parts.append(f"{len(names)} {verb} ({listed(names)})")
    passes, informative = (sum(target["verdict"] == "PASS" for target in targets), informative_passes(run))
    alike = "" if informative == passes else f" Informative: {informative} of the {passes} that pass."
    return f"Of {len(targets)} targets, {listed(parts)}.{alike}"
