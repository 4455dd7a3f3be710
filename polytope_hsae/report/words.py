"""Numbers and names as a reader sees them: formats with units, metrics and arms in words."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..config import Config

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


def percent(share: float | None, digits: int = 0) -> str:
    """A share as percent, or a dash."""
    return DASH if share is None else f"{number(100 * share, digits)}{PERCENT}"


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

    @property
    def within(self) -> str:
        """The name within a sentence."""
        return self.name if self.name.startswith("FVU") else self.name.lower()


TARGETS = {
    "median_angle_deg": TargetWords(
        "Hierarchy angle",
        "Median angle between a parent's direction and what sets its children apart from it.",
        1,
        "°",
        1,
    ),
    "purity_gain_pp": TargetWords(
        "Purity gain",
        "How much more of a parent's activation falls on its own concept's rows, teacher minus baseline.",
        1,
        " points",
        1,
    ),
    "leakage_reduction": TargetWords(
        "Leakage reduction",
        "How much less of a row's activation lands on other concepts' parents, relative to the baseline.",
        100,
        PERCENT,
        1,
    ),
    "steering_leakage_reduction": TargetWords(
        "Steering leakage reduction",
        "How much less other words move when a concept is pushed by the same amount, relative to the baseline.",
        100,
        PERCENT,
        1,
    ),
    "reconstruction_parity": TargetWords(
        "FVU change",
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
        "ev_all_rows": MetricWords("EV, all rows", "massive activations included", UP),
        "ev_row_mean": MetricWords("EV, mean over rows", "each row's own EV, averaged", UP),
        "fvu": MetricWords("Unexplained variance", "FVU, 1 minus EV", DOWN),
        "ev_causal": MetricWords("Causal EV", "errors weighted by what they do to the logits", UP),
        "ev_dimension": MetricWords("EV per dimension", "each residual dimension's own EV, averaged", UP),
        "ev_dimension_q05": MetricWords("EV of the worst dimensions", "5 % quantile over dimensions", UP),
        "l0": MetricWords("L0", "active latents per row, parents and children", digits=1),
    },
    "Language model with the reconstruction spliced in": {
        "ce_recovered": MetricWords("Loss recovered", "1: the clean loss; 0: the loss under mean ablation", UP),
        "ce_recovered_massive_kept": MetricWords(
            "Loss recovered, massive rows kept", "massive activations left as they are", UP
        ),
        "delta_ce": MetricWords("Increase in loss", "nats per token", DOWN),
        "kl": MetricWords("KL", "from the clean next-token distribution, nats", DOWN),
        "kl_massive_kept": MetricWords("KL, massive rows kept", "massive activations left as they are", DOWN),
        "ev_logit": MetricWords("EV of the logits", "1 minus squared logit error over that of mean ablation", UP),
        "ce_clean": MetricWords("Loss, clean", "nats per token"),
        "ce_spliced": MetricWords("Loss, spliced", "with the reconstruction, nats per token", DOWN),
        "ce_ablated": MetricWords("Loss, mean ablation", "with the mean activation, nats per token"),
    },
    "Concepts on held-out documents and words": {
        "purity": MetricWords("Purity", "a latent's activation over all concepts' rows: share on its own rows", UP),
        "purity_auroc": MetricWords("AUROC", "a concept's rows against the other concepts' rows", UP),
        "leakage": MetricWords(
            "Leakage", "a row's activation over all concepts' latents: share on other concepts' latents", DOWN
        ),
        "leakage_all_rows": MetricWords(
            "Leakage, all rows", "rows on which no concept's latent is on count as 1", DOWN
        ),
        "recall": MetricWords("Recall", "share of a concept's rows with its latent on", UP),
        "no_fire_rate": MetricWords("No-fire rate", "share of labelled rows on which no concept's latent is on"),
        "f1_best": MetricWords("F1 of the best latent", "parent or child, threshold chosen on train rows", UP),
        "f1_best_few": MetricWords("F1 of the best five", "positive where any of them is above its threshold", UP),
        "split": MetricWords("Feature splitting", "F1 of the best five latents minus F1 of the best one", DOWN),
        "absorb": MetricWords(
            "Feature absorption",
            "of rows where a probe finds the concept: share where its latent is off and another latent writes at "
            "least 0.4 of it; a parent's own children are off whenever it is",
            DOWN,
        ),
        "absorb_with_children": MetricWords(
            "Absorption, own children too",
            "also rows where one of its children writes that much, and more than the parent",
            DOWN,
        ),
        "probe_recall": MetricWords("Probe recall", "share of a concept's rows where the probe finds it"),
    },
    "Hierarchy": {
        "edge_precision": MetricWords(
            "Edge precision", "of the model's edges between matched latents: share that the concepts have", UP
        ),
        "edge_recall": MetricWords(
            "Edge recall", "share of child concepts whose latent is a child of their parent's latent", UP
        ),
        "parent_given_child": MetricWords("P(parent on | child on)", "1 by construction for gated children", UP),
        "child_given_parent": MetricWords("P(child on | parent on)", "median over children", UP),
        "probe_child": MetricWords("Cosine with the child's atom", "of a child concept's probe", UP),
        "probe_parent": MetricWords("Cosine with the parent's direction", "of the same probe", UP),
        "probe_min": MetricWords("The smaller cosine", "of the two", UP),
    },
    "Firing rates and dead latents": {
        "dead_parents": MetricWords("Dead parents", "share that never fires on the split", DOWN),
        "dead_children": MetricWords("Dead children", "share that never fires, of live parents", DOWN),
        "dead_children_routed": MetricWords(
            "Dead children, weighted", "each parent weighted by how often it fires", DOWN
        ),
        "atoms_in_use": MetricWords("Live children", "children that fire at least once, per live parent", digits=1),
        "max_firing_rate": MetricWords("Max firing rate", "of the parent that fires most often"),
        "entropy": MetricWords("Router entropy", "of the parents' shares of all firings, nats"),
    },
    "Steering": {
        "steering_leakage": MetricWords(
            "Side effects", "KL outside the concept's own words, nats; over concepts that reach the dose", DOWN
        ),
        "sibling_kl": MetricWords("KL among siblings", "among the parent's children, nats", DOWN),
        "steering_unreached": MetricWords("Not reached", "share of concepts that do not reach the dose", DOWN),
        "child_steering_leakage": MetricWords("Side effects, children", "KL outside the child's own words", DOWN),
        "child_sibling_kl": MetricWords("KL among a child's siblings", "nats", DOWN),
        "child_steering_unreached": MetricWords("Not reached, children", "the same share of child concepts", DOWN),
    },
}
OF_MASSIVE_ROWS = ("ev_all_rows", "ce_recovered_massive_kept", "kl_massive_kept")  # without massive rows: duplicates
OWN_SLOTS = "Concepts, read from the latent that the teacher initialised"
OWN_SLOTS_SUFFIX = "_own_slots"
METRICS = {key: words for group in METRIC_GROUPS.values() for key, words in group.items()}

KINDS = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka"}
STARTS = {
    "random": "H-SAE, random initialisation",
    "teacher": "H-SAE initialised from the concept directions",
    "permuted_teacher": "control: H-SAE initialised from directions of permuted concepts, every word moved to a random "
    "concept",
    "random_teacher": "control: H-SAE initialised from random directions of equal length",
}
MATCHED = {"l0": "L0", "params": "parameters", "flops": "FLOPs per row"}
LABELS = {
    "current_token": "the concept of the current token",
    "next_token": "the concept of the next token",
    "belief": "the concept that the model expects next",
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
        said = f"flat {KINDS[arm.kind]} SAE"
        if arm.match:
            alike = listed([words for key, words in MATCHED.items() if key in arm.match])
            said += f", {alike} matched to {arm_title(next(iter(arm.match.values())))}"
    changed = [f"{key} = {value}" for block in (arm.hsae, arm.teacher, arm.flat) for key, value in block.items()]
    return said + (f"; {', '.join(changed)}" if changed else "")


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
