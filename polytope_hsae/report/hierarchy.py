"""Is the hierarchy there? The answer in three parts, computed from evidence.json."""

from typing import Any, NamedTuple

from .read import RunFiles
from .words import arm_title, interval, listed, number, percent

BETA_RANGE = (0.8, 1.25)
FEW = 5  # parents from which a control's beta is compared
CONTROLS = {"pseudo_parents": "pseudo-parents", "shuffled_rows": "shuffled rows"}


class Answer(NamedTuple):
    """A question, its answer in a word or two, and what the answer rests on."""

    question: str
    answer: str
    why: str


def answers(run: RunFiles) -> list[Answer]:
    """Whether siblings cluster, whether they do so at right angles, and whether trained children follow it."""
    return [_siblings(run), _right_angles(run), *_decision(run), _trained(run)]


def _trained(run: RunFiles) -> Answer:
    question = "Do trained children stand for child concepts?"
    found = {arm: one for arm in run.arms if (one := run.metric(arm, "edge_recall"))}
    if not found:
        return Answer(question, "not measured", "No arm with children has enough labelled rows.")
    shares = listed([f"{percent(one['value'])} ({arm_title(arm)})" for arm, one in found.items()])
    chance = percent(next(iter(found.values()))["chance"])
    most = max(found.values(), key=lambda one: one["value"])
    said = f"Child concepts whose best latent is a child of their parent's latent: {shares}; by chance {chance}."
    return Answer(question, f"{percent(most['value'])} at most", said)


def _siblings(run: RunFiles) -> Answer:
    question = "Do siblings share a direction?"
    main = run.evidence["main"]["fraction_z_above_3"]
    controls = {name: run.evidence[key]["fraction_z_above_3"] for key, name in CONTROLS.items()}
    known = {name: share for name, share in controls.items() if share is not None}
    shares = f"{percent(main)} of the parents have z above 3"
    beside = (
        f"{shares}; of the controls, {listed([f'{percent(share)} ({name})' for name, share in known.items()])}."
        if known
        else f"{shares}."
    )
    if not main:
        return Answer(question, "no", beside)
    if known and main <= max(known.values()):
        return Answer(question, "no more than controls", beside)
    return Answer(question, "yes" if main > 0.5 else "for some parents", beside)


def _right_angles(run: RunFiles) -> Answer:
    """`supported` takes a beta in range, and controls whose beta differs; the angle is the same for random vectors."""
    question = "Do siblings differ at right angles?"
    main = run.evidence["main"]
    said = [_angle_sentence(run)]
    if main["median_beta"] is None:
        return Answer(
            question, "not testable", " ".join([*said, f"β is missing: {main.get('why', 'no parent has one')}."])
        )
    low, high = main["beta_ci95"] or (main["median_beta"],) * 2
    fits = low >= BETA_RANGE[0] and high <= BETA_RANGE[1]
    said.append(f"β is {number(main['median_beta'], 2)} ({interval([low, high], 2)}); right angles give 1.")
    apart = []
    for key, name in CONTROLS.items():
        found = run.evidence[key]
        beta, ci95 = found.get("median_beta"), found.get("beta_ci95")
        if beta is None:
            said.append(f"No β for {name}, where too few parents cluster.")
            continue
        count = _n_with_beta(found)
        said.append(
            f"For {name} it is {number(beta, 2)}, from {count} of them{', too few to compare' * (count < FEW)}."
        )
        apart.append(bool(ci95) and count >= FEW and (ci95[0] > high or ci95[1] < low))
    omega = main.get("omega_ci95")
    if omega and omega[0] > 0:
        said.append(f"ω is {number(main['omega'], 3)} ({interval(omega)}), above 0: not exactly at right angles.")
    answer = "no" if not fits else "supported" if apart and all(apart) else "it fits, but is not shown"
    return Answer(question, answer, " ".join(said))


def _decision(run: RunFiles) -> list[Answer]:
    """The decision at a stated level, all parts of which must pass; runs of earlier versions have none."""
    found = run.evidence["main"].get("decision")
    if found is None:
        return []
    question = f"Is a hierarchy with orthogonal differences shown at level {found['alpha']:g}?"
    parts = {
        passes: [_part(name) for name, test in found["tests"].items() if test["passes"] is passes]
        for passes in (True, False)
    }
    said = [
        f"{verb}: {listed(parts[passes])}."
        for verb, passes in (("Passed", True), ("Not passed", False))
        if parts[passes]
    ]
    return [Answer(question, "yes" if found["hierarchy"] else "no", " ".join([*said, *_untested(found)]))]


def _part(name: str) -> str:
    return {"omega": "ω", "kappa": "κ", "beta": "β"}.get(name, name.replace("_", " "))


def _untested(found: dict[str, Any]) -> list[str]:
    return [f"Not tested: {found['why']}."] if "why" in found else []


def _angle_sentence(run: RunFiles) -> str:
    target = run.target("median_angle_deg")
    controls = [
        f"{number(value, 1)}° ({CONTROLS[name]})" for name, value in target["controls"].items() if value is not None
    ]
    beside = f"in the controls {listed(controls)}" if controls else "without controls to compare"
    return f"The median angle is {number(target['measured'], 1)}°, {beside}: random directions give 90° too."


def _n_with_beta(found: dict[str, Any]) -> int:
    """Parents of a variant that have a beta: z above 3 and at least 3 children."""
    children = found["children"]
    return len({parent for parent, beta in zip(children["parent"], children["beta"], strict=True) if beta is not None})
