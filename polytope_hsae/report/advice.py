"""What to try next: small rules, each from a run's results to one sentence and, where there is one, a command.

A rule speaks only of what this run measured; what it proposes is worded as something to try. Commands are meant for
the run folder, and write to a folder beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..evaluation.targets import MIN_UNITS, counted_units
from .read import RunFiles
from .words import TARGETS, arm_title, interval, listed, number, percent

FINAL_HOOK = "final_residual_pre_unembed"  # as in lm.py, whose import would load transformers
MANY_DEAD = 0.2  # share of parents never active from which it is worth a word
MANY_UNREACHED = 1 / 3
PACKAGED_TOKENS = 555_847  # of the packaged sample, as its file says
SHORT_CORPUS = 0.9  # rows per token asked for, below which the corpus has ended
WORD_TARGETS = ("purity_gain_pp", "leakage_reduction", "steering_leakage_reduction")


@dataclass(frozen=True)
class Advice:
    """One thing to try: why, and the command that does it (None where there is none)."""

    sentence: str
    command: str | None = None


Rule = Callable[[RunFiles], Advice | None]


def command(run: RunFiles, suffix: str, *overrides: str) -> str:
    """`hsae run` of this run's config with some fields replaced, into a folder of its own."""
    options = " ".join(f"--set {override}" for override in overrides)
    return f"hsae run config.yaml {options} --out ../{run.config.run.name}-{suffix}"


def no_hierarchy(run: RunFiles) -> Advice | None:
    """No parent's children share a direction: a teacher has nothing to hand over."""
    if run.has_hierarchy:
        return None
    return Advice(
        f"No parent's children share a direction in the {run.evidence['rows_of']} (z above 3 for none), so a teacher "
        "made from these concepts has nothing to hand over. Try a larger language model (model.name) or other concepts "
        "(concepts.ontology) before anything else."
    )


def hierarchy_like_controls(run: RunFiles) -> Advice | None:
    """The real parents do no better than made-up ones."""
    main, pseudo = (run.evidence[key]["fraction_z_above_3"] for key in ("main", "pseudo_parents"))
    if not main or pseudo is None or main > pseudo:
        return None
    return Advice(
        f"Made-up parents share a direction as often ({percent(pseudo)}) as the real ones ({percent(main)}), so the "
        "concepts do not form a hierarchy here. Try other concepts (concepts.ontology)."
    )


def more_concepts(run: RunFiles) -> Advice | None:
    """An interval spans its threshold and rests on few concepts."""
    open_targets = [
        target
        for target in run.results["targets"]
        if target["name"] in WORD_TARGETS and target["verdict"] == "INCONCLUSIVE" and target["ci95"] is not None
    ]
    if not open_targets:
        return None
    first, words = open_targets[0], TARGETS[open_targets[0]["name"]]
    names = listed([TARGETS[target["name"]].name.lower() for target in open_targets])
    over = counted_units(first["name"], first["n"])
    spans = f"{interval(first['ci95'], words.digits, words.factor, words.unit)} over {over}"
    why = "the interval spans the threshold" if first["n"] >= MIN_UNITS else f"fewer than {MIN_UNITS} decide nothing"
    total, least = len(run.concepts["parents"]), run.config.concepts.min_test_rows
    said = f"Undecided because {why}: {names} ({spans})."
    if first["n"] < 0.8 * total:
        said = f"{said} There are {total} parents, and only those with at least {least} labelled rows count."
        return _more_text(run, f"{said} More text gives more of them.")
    return Advice(
        f"{said} Nearly all of the {total} parents are in use already, so only more parents narrow it.",
        command(run, "more-parents", f"concepts.max_parents={2 * run.config.concepts.max_parents}"),
    )


def nothing_measured(run: RunFiles) -> Advice | None:
    """A concept target without a value, for want of labelled rows or of an arm."""
    missing = [t for t in run.results["targets"] if t["measured"] is None and t["name"] in WORD_TARGETS]
    if not missing:
        return None
    name = TARGETS[missing[0]["name"]].name
    said = f"{name} could not be measured: {missing[0].get('why', 'no reason was recorded')}."
    if {"baseline", "teacher"} - set(run.arms):
        return Advice(f"{said} The targets compare arms named baseline and teacher; add them to the config's arms.")
    if run.results["label"] == "belief":
        return Advice(
            f"{said} Belief labels need a concept to get {run.config.concepts.belief_threshold:g} of the model's "
            "probability; labels from the text itself need no threshold.",
            command(run, "next-token", "concepts.label=next_token"),
        )
    return _more_text(run, f"{said} More text gives more labelled rows.")


def _more_text(run: RunFiles, said: str) -> Advice:
    """More tokens, as far as the corpus is known to reach."""
    corpus = run.config.corpus
    more = 2 * corpus.max_tokens
    if corpus.kind == "tokens" and corpus.path is None:
        more = min(more, PACKAGED_TOKENS)
        said += (
            f" The packaged sample ends at {PACKAGED_TOKENS:,} tokens; after that, name another corpus (corpus.path)."
        )
        used_up = more < 1.1 * corpus.max_tokens
    else:
        rows = sum(run.store["rows"].values()) if run.store else corpus.max_tokens
        used_up = rows < SHORT_CORPUS * corpus.max_tokens
        said += " This corpus is used up; name a longer one." if used_up else " Use it if the corpus is that long."
    return Advice(said, None if used_up else command(run, "more-text", f"corpus.max_tokens={more}"))


def steer_at_the_end(run: RunFiles) -> Advice | None:
    """Steering fails at an inner hook, where a current-token parent says what is, not what comes."""
    failed = run.target("steering_leakage_reduction")["verdict"] == "FAIL"
    if not failed or run.results["hook"] == FINAL_HOOK or run.results["label"] != "current_token":
        return None
    return Advice(
        f"Steering fails at {run.results['hook']} with current-token labels. Such a parent says what the present token "
        "is, and steering asks it to change the next one. Hook and label change together: what comes next is readable "
        "at the final residual, and only next-token labels name it. This run did not measure that.",
        command(run, "final-residual", f"model.hook={FINAL_HOOK}", "concepts.label=next_token"),
    )


def smaller_push(run: RunFiles) -> Advice | None:
    """Many concepts never reached the effect that steering asks for."""
    found = {arm: run.metric(arm, "steering_unreached") for arm in run.judged}
    many = {arm: one["value"] for arm, one in found.items() if one and one["value"] > MANY_UNREACHED}
    if not many:
        return None
    nats = run.steering["target_nats"]
    shares = listed([f"{percent(share)} of the concepts in the {arm_title(arm)} arm" for arm, share in many.items()])
    return Advice(
        f"Steering did not reach {nats:g} nats for {shares}, so the comparison rests on the rest. A smaller effect is "
        "within reach of more.",
        command(run, "smaller-push", f"eval.steering.target_nats={nats / 2:g}"),
    )


def words_do_not_matter(run: RunFiles) -> Advice | None:
    """Purity passes, but the control with the wrong words is not clearly worse."""
    permuted = run.permuted
    if permuted is None or run.target("purity_gain_pp")["verdict"] != "PASS":
        return None
    lead = run.lead(permuted, "purity")
    if lead is None or not lead["ci95"] or lead["ci95"][0] > 0:
        return None
    return Advice(
        f"Purity passes, but the teacher leads the {arm_title(permuted)} by {number(100 * lead['value'], 1)} points "
        f"({interval(lead['ci95'], 1, 100)}): any fixed direction may do. More seeds or concepts would tell.",
        command(run, "next-seed", f"run.seed={run.config.run.seed + 1}"),
    )


def worse_than_flat(run: RunFiles) -> Advice | None:
    """A flat dictionary explains more at the same number of active latents."""
    arm = run.ablations["reference"]
    ev = {flat: found["value"] for flat in run.flat_arms if (found := run.metric(flat, "ev"))}
    if not ev or arm in run.flat_arms:
        return None
    flat = max(ev, key=lambda name: ev[name])
    gap = run.difference(flat, "ev")
    l0, own_l0, own_ev = run.metric(flat, "l0"), run.metric(arm, "l0"), run.metric(arm, "ev")
    if not (gap and gap["ci95"] and gap["ci95"][0] > 0 and l0 and own_l0 and own_ev):
        return None
    said = (
        f"The arm {arm_title(flat)} explains more ({number(ev[flat])} with {number(l0['value'], 1)} active latents) "
        f"than the H-SAE {arm_title(arm)} ({number(own_ev['value'])} with {number(own_l0['value'], 1)})."
    )
    hsae = run.config.arm_hsae(run.config.arm(arm))
    if hsae.children == "direct":
        return Advice(f"{said} More steps are one thing to try.", longer(run))
    wider = command(run, "wider", f"hsae.subspace_dim={2 * hsae.subspace_dim}")
    return Advice(f"{said} Wider subspaces for the children are one thing to try.", wider)


def costs_reconstruction(run: RunFiles) -> Advice | None:
    """The teacher arm reconstructs worse than allowed."""
    target = run.target("reconstruction_parity")
    if target["verdict"] != "FAIL" or target["measured"] < 0:
        return None
    anchor = run.config.arm_teacher(run.config.arm("teacher")).anchor
    said = f"The teacher arm leaves {percent(target['measured'], 1)} more variance unexplained than the baseline"
    if anchor != "none":
        return Advice(
            f"{said}, with its rows held by the anchor '{anchor}'. Without an anchor they can move to where they fit.",
            command(run, "no-anchor", "teacher.anchor=none"),
        )
    return Advice(f"{said}. A shorter first stage, or none, leaves more steps with everything free (training.teacher).")


def dead_parents(run: RunFiles) -> Advice | None:
    """Many parents are never active."""
    found = {arm: run.metric(arm, "dead_parents") for arm in run.judged}
    many = {arm: one["value"] for arm, one in found.items() if one and one["value"] > MANY_DEAD}
    n_parents = run.config.hsae.n_parents
    if not many or n_parents < 2 * len(run.concepts["parents"]):
        return None
    shares = listed([f"{percent(share)} ({arm_title(arm)})" for arm, share in many.items()])
    return Advice(
        f"Many parents are never active on the split: {shares}. Fewer parents, or more steps, use them better.",
        command(run, "fewer-parents", f"hsae.n_parents={n_parents // 2}"),
    )


def repeat(run: RunFiles) -> Advice:
    """One training run per arm says nothing on the spread between runs; after a full pass, also another hook."""
    seed = run.config.run.seed + 1
    again = command(run, f"seed-{seed}", f"run.seed={seed}")
    if all(target["verdict"] == "PASS" for target in run.results["targets"]):
        return Advice(
            "All targets pass, in one run of every arm. Repeat it with other seeds, and at another hook (model.hook), "
            "before relying on it.",
            again,
        )
    return Advice(
        "Every arm was trained once. Another seed shows how much of a difference is luck. It changes the split of "
        "documents and of words, the random starts and the order of rows; model, text and concepts stay.",
        again,
    )


def longer(run: RunFiles) -> str:
    """The command that trains every arm for twice as long."""
    training = run.config.training
    doubled = [
        f"training.{name}.stages.{row}.steps={2 * stage.steps}"
        for name, stages in (("baseline", training.baseline.stages), ("teacher", training.teacher.stages))
        for row, stage in enumerate(stages)
    ]
    return command(run, "longer", *doubled)


RULES: tuple[Rule, ...] = (
    no_hierarchy,
    hierarchy_like_controls,
    nothing_measured,
    more_concepts,
    steer_at_the_end,
    smaller_push,
    words_do_not_matter,
    costs_reconstruction,
    worse_than_flat,
    dead_parents,
    repeat,
)


def advise(run: RunFiles) -> list[Advice]:
    """What the rules say, in their order."""
    return [said for rule in RULES if (said := rule(run)) is not None]
