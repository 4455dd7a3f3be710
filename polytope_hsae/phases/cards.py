"""card.json of every saved arm: what it was trained on, what a teacher put into it, and what phase 4 measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ArmConfig
from ..fileio import read_json
from ..models.card import Card, ParentSlot, Slot, read_card, write_card
from ..records import Evidence, Results
from ..teacher import Teacher
from .run import Run

OF_PARENT = ("z", "p", "q", "auroc", "reliability")
OF_CHILD = ("beta", "delta_z", "delta_q", "auroc", "reliability")


def arm_card(run: Run, arm: ArmConfig, n_children: int, teacher_parents: Sequence[int]) -> Card:
    """The card of an arm that was just trained.

    teacher_parents: the concepts that its teacher, the real one or a control, put into its first parents. A control's
    slots do not hold what the concepts' names say, and are left out.
    """
    evidence = read_json(run.phase(1) / "evidence.json", Evidence)
    options = run.config.geometry
    return {
        "model": run.lm.name,
        "revision": run.lm.revision,
        "hook": run.hook,
        "tokenizer_sha256": run.lm.tokenizer_sha256,
        "arm": arm.name,
        "row_norm": run.row_norm,
        "geometry": {"metric": options.metric, "shrinkage": options.shrinkage, "seed": run.config.run.seed},
        "evidence_of": evidence["rows_of"],
        "slots": _slots(run, arm, n_children, teacher_parents, evidence) if arm.init == "teacher" else [],
        "mapped": None,
        "split": None,
        "metrics": None,
    }


def _slots(
    run: Run, arm: ArmConfig, n_children: int, teacher_parents: Sequence[int], evidence: Evidence
) -> list[ParentSlot]:
    names = [child.name for parent in run.concepts.parents for child in parent.children]
    main, children = evidence["main"], child_concepts(run, arm, n_children)

    def child(place: int, concept: int) -> Slot:
        return {
            "child": place, "concept": names[concept], "evidence": _row(main["children"], OF_CHILD, concept)
        }  # fmt: skip

    return [
        {
            "parent": slot,
            "concept": run.concepts.parents[concept].name,
            "evidence": _row(main["parents"], OF_PARENT, concept),
            "children": [child(j, row) for j, row in enumerate(children.get(slot, [])) if row is not None],
        }
        for slot, concept in enumerate(teacher_parents)
    ]


def _row(columns: Mapping[str, Sequence[Any]], names: Sequence[str], row: int) -> dict[str, float | None]:
    return {name: columns[name][row] for name in names}


def child_concepts(run: Run, arm: ArmConfig, n_children: int) -> dict[int, list[int | None]]:
    """By slot of a teacher's parent, the child concept that the teacher put into each of the parent's child slots."""
    options = run.config.arm_teacher(arm)
    if not (options.seed_child and options.seed_projectors):
        return {}
    teacher = Teacher.load(run.phase(1) / "teacher.safetensors")
    pairs = [(parent.name, child.name) for parent in run.concepts.parents for child in parent.children]
    concept_of = {pair: row for row, pair in enumerate(pairs)}
    rows: dict[int, list[int | None]] = {parent: [] for parent in range(teacher.n_parents)}
    known = teacher.child_delta_unified.any(dim=1).tolist()  # a child that was not seen seeds nothing
    for parent, name, seeds in zip(teacher.child_parent.tolist(), teacher.child_names, known, strict=True):
        rows[parent].append(concept_of[teacher.parent_names[parent], name] if seeds else None)
    return {parent: (own + [None] * n_children)[:n_children] for parent, own in rows.items()}


def add_measured(run: Run) -> None:
    """Add to every arm's card what phase 4 found, from its files; one that has it already is not written again."""
    results = read_json(run.phase(4) / "results.json", Results)
    latents = read_json(run.phase(4) / "latents.json")["arms"]
    concepts = [parent.name for parent in run.concepts.parents]
    for arm in run.config.arms:
        folder = run.arm_folder(arm.name) / "model"
        card = read_card(folder)
        if card is None:  # a run of an earlier version
            continue
        card["mapped"] = [
            {
                "parent": of["latent"],
                "concept": concepts[of["concept"]],
                "purity": of["purity"],
                "leakage": of["leakage"],
                "recall": of["recall"],
            }
            for of in latents[arm.name]["parents"]
            if of["mapped"]
        ]
        card["split"] = results["split"]
        card["metrics"] = dict(results["arms"][arm.name])
        write_card(folder, card)
