"""Numbers and names as a reader sees them: formats with units, metrics and arms in words."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..config import Config, HSAEConfig

DASH = "–"
MINUS = "−"
PERCENT = "\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Fixed digits, thousands separated, a true minus; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(ci95: list[float] | None, digits: int = 3, factor: float = 1.0, unit: str = "") -> str:
    """'0.12 to 0.34' with the unit, or a dash."""
    if ci95 is None:
        return DASH
    return f"{number(ci95[0] * factor, digits)} to {number(ci95[1] * factor, digits)}{unit}"


def percent(share: float | None, digits: int = 0, sign: bool = False) -> str:
    """A share as percent, or a dash."""
    return DASH if share is None else f"{number(100 * share, digits, sign)}{PERCENT}"


def listed(items: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def counted(count: int, noun: str) -> str:
    """'1 concept', '16 concepts'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    """The lines of a Markdown table; numbers: whether all columns but the first are set to the right."""
    lines = [header, ["---", *["---:" if numbers else "---"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


class TargetWords(NamedTuple):
    """How a target is shown: name, meaning, and the scale from results.json to the shown unit."""

    name: str
    meaning: str
    factor: float
    unit: str
    digits: int


TARGETS = {
    "median_angle_deg": TargetWords(
        "Angle of the hierarchy",
        "Median angle between a parent's direction and what sets its children apart from it.",
        1,
        "°",
        1,
    ),
    "purity_gain_pp": TargetWords(
        "Gain of purity",
        "How much more of a parent's activation falls on its own concept's rows, teacher minus baseline.",
        1,
        " points",
        1,
    ),
    "leakage_reduction": TargetWords(
        "Fall of leakage",
        "How much less of a row's activation lands on other concepts' parents, relative to the baseline.",
        100,
        PERCENT,
        1,
    ),
    "steering_leakage_reduction": TargetWords(
        "Fall of steering side effects",
        "How much less other words move when a concept is pushed by the same amount, relative to the baseline.",
        100,
        PERCENT,
        1,
    ),
    "reconstruction_parity": TargetWords(
        "Change of reconstruction error",
        "Unexplained variance of the teacher arm relative to the baseline's.",
        100,
        PERCENT,
        1,
    ),
}


class MetricWords(NamedTuple):
    """How a metric is shown in the table of arms; `better` is the direction in which it is."""

    name: str
    meaning: str
    better: str = ""
    digits: int = 3


UP, DOWN = "↑", "↓"
METRIC_GROUPS: dict[str, dict[str, MetricWords]] = {
    "Reconstruction": {
        "ev": MetricWords("Explained variance", "EV, share of the activations' variance", UP),
        "ev_all_rows": MetricWords("Explained variance, all rows", "with rows of massive norm, where ev has none", UP),
        "ev_row_mean": MetricWords("Explained variance of a row", "mean over all rows of each row's own", UP),
        "fvu": MetricWords("Unexplained variance", "FVU, the rest of it", DOWN),
        "ev_causal": MetricWords("Causal EV", "the same with errors weighed by what they do to the logits", UP),
        "ev_dimension": MetricWords("EV per coordinate", "mean over the coordinates of each one's own EV", UP),
        "ev_dimension_q05": MetricWords("Worst coordinates", "the 5 % quantile of the coordinates' EV", UP),
        "l0": MetricWords("Active latents", "L0, parents and children in use per row", digits=1),
    },
    "Language model with the reconstruction in place": {
        "ce_recovered": MetricWords("Loss recovered", "share of what ablating the hook costs", UP),
        "ce_recovered_massive_kept": MetricWords(
            "Loss recovered, massive rows kept", "the same with rows of massive norm left as they are", UP
        ),
        "delta_ce": MetricWords("Rise of the loss", "nats per token", DOWN),
        "kl": MetricWords("KL", "from the clean next-token distribution, nats", DOWN),
        "kl_massive_kept": MetricWords("KL, massive rows kept", "with rows of massive norm left as they are", DOWN),
        "ev_logit": MetricWords("EV of the logits", "squared error of the logits beside what ablating costs", UP),
        "ce_clean": MetricWords("Loss, clean", "nats per token"),
        "ce_spliced": MetricWords("Loss, spliced", "with the reconstruction instead, nats", DOWN),
        "ce_ablated": MetricWords("Loss, ablated", "with the mean activation instead, nats"),
    },
    "Concepts on held-out documents and words": {
        "purity": MetricWords("Purity", "of a concept's latent over all concepts' rows: share on its own rows", UP),
        "purity_auroc": MetricWords("AUROC", "a concept's rows against the other concepts' rows", UP),
        "leakage": MetricWords(
            "Leakage", "of a row over all concepts' latents: share on other concepts' latents", DOWN
        ),
        "leakage_all_rows": MetricWords("Leakage, all rows", "the same with a silent row counted as leaked", DOWN),
        "recall": MetricWords("Recall", "share of a concept's rows with its latent active", UP),
        "no_fire_rate": MetricWords("Silent rows", "share of labelled rows on which no concept's latent is active"),
        "f1_best": MetricWords("F1 of the best latent", "parent or child, with the best threshold on train rows", UP),
        "f1_best_few": MetricWords("F1 of the best five", "a row counts where any of them is above its threshold", UP),
        "split": MetricWords("Split", "F1 of the best five latents minus F1 of the best one", DOWN),
        "absorb": MetricWords(
            "Absorbed",
            "share of the rows where a probe finds the concept in which its latent is silent and another one writes "
            "0.4 or more of it; a parent's own children cannot, for they are silent with it",
            DOWN,
        ),
        "absorb_with_children": MetricWords(
            "Absorbed, own children too",
            "also rows in which an own child writes that much and more than the parent",
            DOWN,
        ),
        "probe_recall": MetricWords("Found by the probe", "share of a concept's rows; of these, shares are absorbed"),
    },
    "Hierarchy": {
        "edge_precision": MetricWords(
            "Edges, precision", "of the model's edges between matched latents, share that the concepts have", UP
        ),
        "edge_recall": MetricWords(
            "Edges, recall", "share of child concepts whose latent is a child of their parent's latent", UP
        ),
        "parent_given_child": MetricWords("Parent on, given child", "1 by construction for gated children", UP),
        "child_given_parent": MetricWords("Child on, given parent", "median over children", UP),
        "probe_child": MetricWords("Child's atom", "cosine of a child concept's probe with its latent's atom", UP),
        "probe_parent": MetricWords("Parent's direction", "cosine of that probe with what the parent writes", UP),
        "probe_min": MetricWords("The smaller cosine", "of the two", UP),
    },
    "Use of the latents": {
        "dead_parents": MetricWords("Dead parents", "share never active on the split", DOWN),
        "dead_children": MetricWords("Dead children", "share never active, of parents that were", DOWN),
        "dead_children_routed": MetricWords(
            "Dead children per routed token", "every parent counted as often as on", DOWN
        ),
        "atoms_in_use": MetricWords("Atoms in use", "children active at least once, per active parent", digits=1),
        "max_firing_rate": MetricWords("Max firing rate", "share of rows with the most used parent on"),
        "entropy": MetricWords("Entropy of the router", "of the parents' shares of all parent codes, nats"),
    },
    "Steering": {
        "steering_leakage": MetricWords(
            "Side effects", "KL off the concept's own words, nats; over those that the arm reaches", DOWN
        ),
        "sibling_kl": MetricWords("Shift among siblings", "KL among the parent's children, nats", DOWN),
        "steering_unreached": MetricWords("Not reached", "share of concepts that could not be pushed so far", DOWN),
        "child_steering_leakage": MetricWords("Side effects, children", "KL off the child's own words, nats", DOWN),
        "child_sibling_kl": MetricWords("Shift among a child's siblings", "KL among the siblings, nats", DOWN),
        "child_steering_unreached": MetricWords("Not reached, children", "the same share of child concepts", DOWN),
    },
}
OF_MASSIVE_ROWS = ("ev_all_rows", "ce_recovered_massive_kept", "kl_massive_kept")  # else the same without the suffix
OWN_SLOTS = "Concepts, each read from the teacher's own slot"
OWN_SLOTS_SUFFIX = "_own_slots"
METRICS = {key: words for group in METRIC_GROUPS.values() for key, words in group.items()}


KINDS = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka"}
STARTS = {
    "random": "H-SAE from a random start",
    "teacher": "H-SAE that starts from the concept directions",
    "permuted_teacher": "H-SAE that starts from such directions after every word was moved to a random concept: a "
    "control with wrong words",
    "random_teacher": "H-SAE that starts from random directions of equal length: a control",
}


def arm_title(name: str) -> str:
    """'permuted teacher' for permuted_teacher, 'flat BatchTopK' for flat_batchtopk."""
    return re.sub("[a-z]+", lambda found: KINDS.get(found[0], found[0]), name.replace("_", " "))


def arm_meaning(config: Config, name: str) -> str:
    """One clause on how an arm was made, from its config."""
    arm = config.arm(name)
    if arm.kind == "hsae":
        said = STARTS[arm.init]
    else:
        said = f"one flat {KINDS[arm.kind]} dictionary without a hierarchy"
        asked = {"l0": "active latents", "params": "parameters", "flops": "FLOPs a row"}
        if arm.match:
            alike = listed([words for key, words in asked.items() if key in arm.match])
            said += f", with as many {alike} as {arm_title(next(iter(arm.match.values())))}"
    changed = [f"{key} = {value}" for block in (arm.hsae, arm.teacher, arm.flat) for key, value in block.items()]
    return said + (f"; {', '.join(changed)}" if changed else "")


def hsae_size(hsae: HSAEConfig) -> str:
    """Sizes, and how many parents and children a row has: at most, or on average where rows share them."""
    P, k, K = hsae.n_parents, hsae.topk_parent, hsae.active_children
    shared_parents, shared_children = hsae.parent_budget != "per_row", hsae.child_budget == "batch"
    most_k = min(P, math.ceil(hsae.budget_slots * k)) if shared_parents else k
    most_K = K
    if shared_children:
        most_K = min(most_k * hsae.n_children_per_parent, math.ceil(hsae.budget_slots * K))
    elif hsae.child_budget == "per_parent":
        most_K = most_k * hsae.topk_child
    most = f"at most {counted(most_k, 'parent')} and {_children(most_K)} active in a row"
    means = [counted(k, "parent")] * shared_parents + [_children(K)] * (most_K > K)
    if hsae.parent_budget == "joint":
        means = [f"{k + K:,} parents and children together"]
    average = f", on average {listed(means)}" if means else ""
    return f"{counted(P, 'parent')} with {_children(hsae.n_children_per_parent)} each; {most}{average}"


def _children(count: int) -> str:
    return f"{count:,} {'child' if count == 1 else 'children'}"


def label_meaning(label: str) -> str:
    """Which concept a row of activations carries."""
    return {
        "current_token": "the concept of the token that is read",
        "next_token": "the concept of the token that follows",
        "belief": "the concept that the model expects next",
    }[label]


def model_meaning(config: Config) -> str:
    """Which language model a run reads."""
    name, revision = config.model.title, config.model.revision
    about = " (packaged: 9 million parameters, trained on textbooks)" if name == "textbook-lm-9m" else ""
    return f"{name}{f' at {revision}' if revision else ''}{about}"


def corpus_meaning(config: Config) -> str:
    """Which text the model reads."""
    corpus = config.corpus
    if corpus.path is None:
        text = "the packaged sample, which textbook-lm-9m wrote itself"
    else:
        text = f"{corpus.kind}: {corpus.path if corpus.kind == 'hub' else Path(corpus.path).name}"
    return f"{text}; at most {corpus.max_tokens:,} tokens, in contexts of {corpus.context_length}"
