"""Have concepts a hierarchy with orthogonal differences? One decision from the evidence (docs/method.md §3).

It is an intersection-union test: each part has level alpha against its own null, and all must pass, so the whole has
level alpha against every world that lacks any one part.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import t as student

from polytope_hsae.geometry.orthogonality import BETA_RANGE
from polytope_hsae.geometry.statistics import Floats, bootstrap_median

# beta may be off by a factor of 1.25, and omega and kappa are squared relative deviations: the same tolerance.
LARGEST_SPREAD = math.log(1.25) ** 2
LEAST_PARENTS = 10


def hierarchy_decision(
    evidence: Mapping[str, Any], alpha: float = 0.01, *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The decision, from one variant of evidence.json (`main` or a control), and the tests that it rests on.

    shared_parent, own_siblings: at least half of the parents have children that share more than random words, and
    more than children dealt out at random. difference: at least half of the children are more than random parts of
    their parents. beta: its median lies in 0.8 to 1.25 (two one-sided tests by bootstrap over parents). omega, kappa:
    the mean over parents is below ln(1.25)^2 (one-sided, Student's t).

    Returns `hierarchy`, `alpha` and `tests`: per test `passes`, what was compared with what, and `why` where
    nothing could be tested, which does not pass; the first such `why` also beside them.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: found {alpha}, allowed: above 0 and below 0.5")
    parents, children = evidence["parents"], evidence["children"]
    tests = {
        "shared_parent": _half_of(parents["p"], alpha),
        "own_siblings": _half_of(parents["dealt_p"], alpha),
        "difference": _half_of(children["delta_p"], alpha),
        "beta": _beta(children, alpha, bootstrap, seed),
        "omega": _below(parents["omega"], alpha),
        "kappa": _below(parents["kappa"], alpha),
    }
    untested = [f"{name}: {test['why']}" for name, test in tests.items() if "why" in test]
    decision = {"hierarchy": all(test["passes"] for test in tests.values()), "alpha": alpha, "tests": tests}
    return {**decision, "why": untested[0]} if untested else decision


def partial_conjunction(p_values: Floats) -> float:
    """p of "fewer than half of the nulls are false" (Benjamini and Heller, 2008): Simes' p of the largest ones.

    Small only if at least half of the hypotheses show an effect, whichever they are.
    """
    least = max(1, math.ceil(0.5 * len(p_values)))
    largest = np.sort(p_values)[least - 1 :]
    return float(min(1.0, (len(largest) * largest / np.arange(1, len(largest) + 1)).min()))


def _known(values: list[float | None]) -> Floats:
    return np.array([value for value in values if value is not None], np.float64)


def _half_of(p_values: list[float | None], alpha: float) -> dict[str, Any]:
    known = _known(p_values)
    if len(known) < LEAST_PARENTS:
        return {"passes": False, "p": None, "why": _too_few(len(known))}
    p = partial_conjunction(known)
    return {"passes": p <= alpha, "p": p, "n": len(known)}


def _beta(children: Mapping[str, Any], alpha: float, bootstrap: int, seed: int) -> dict[str, Any]:
    groups: dict[int, list[float]] = {}
    for parent, beta in zip(children["parent"], children["beta"], strict=True):
        if beta is not None:
            groups.setdefault(parent, []).append(beta)
    if len(groups) < LEAST_PARENTS:
        return {"passes": False, "interval": None, "why": _too_few(len(groups))}
    values = [np.array(group) for group in groups.values()]
    low, high = bootstrap_median(values, bootstrap, seed, level=1 - 2 * alpha)
    passes = BETA_RANGE[0] <= low and high <= BETA_RANGE[1]
    return {"passes": passes, "interval": [low, high], "allowed": list(BETA_RANGE), "n": len(groups)}


def _below(values: list[float | None], alpha: float) -> dict[str, Any]:
    known = _known(values)
    if len(known) < LEAST_PARENTS:
        return {"passes": False, "upper": None, "why": _too_few(len(known))}
    upper = float(known.mean() + student.ppf(1 - alpha, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return {"passes": upper < LARGEST_SPREAD, "upper": upper, "allowed": LARGEST_SPREAD, "n": len(known)}


def _too_few(found: int) -> str:
    return f"found values for {found}, allowed: at least {LEAST_PARENTS}"
