"""The teacher: concepts as read and write directions, and the tensors that initialise a model (docs/method.md
§4).

A concept l in the unified coordinate is written by D = Sigma^(-1/2) l / n with n = |Sigma^(-1/2) l|, and read
by E = Sigma^(1/2) l n / |l|^2, so that E . D = 1 and E D^T holds the causal inner products of the concepts.

Shape suffixes: Q parents, R children (rows over all parents, each parent's in order), d residual width, C
children per parent in the model, s subspace width.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, Json
from torch import Tensor
from typing_extensions import TypedDict

from polytope_hsae.data.concepts import FOLDS, Concepts
from polytope_hsae.fileio import check_tensors, read_tensors, write_tensors
from polytope_hsae.geometry.bases import (
    Projectors,
    completion,
    rotated_rows,
    rotated_together,
    seeded_generator,
    subspace_bases,
)
from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.estimators import ALL, ActivationClassStats, ConceptEstimator
from polytope_hsae.parsing import checked, shown

FORMS = ("dual", "literal")


@dataclass(frozen=True)
class Teacher:
    """Concept directions of Q parents and R children, float64. Make one with `build`, `extract_*` or `load`.

    parent_unified [Q, d] l_p; parent_read E_p; parent_write D_p; child_unified [R, d] l_c;
    child_delta_unified l_c - l_p; child_delta_write its unit write direction (0 where the difference is 0);
    child_parent [R] int64; sigma_sqrt and sigma_inv_sqrt [d, d]; form `dual` or `literal`; metadata: strings
    (estimator, metric, shrinkage, ...).
    """

    parent_names: tuple[str, ...]
    child_names: tuple[str, ...]
    parent_unified: Tensor
    parent_read: Tensor
    parent_write: Tensor
    child_unified: Tensor
    child_delta_unified: Tensor
    child_delta_write: Tensor
    child_parent: Tensor
    sigma_sqrt: Tensor
    sigma_inv_sqrt: Tensor
    form: str
    metadata: Mapping[str, str]

    @property
    def n_parents(self) -> int:
        """Q."""
        return len(self.parent_names)

    @property
    def n_children(self) -> int:
        """R, over all parents."""
        return len(self.child_names)

    @classmethod
    def build(
        cls,
        parent_names: Sequence[str],
        child_names: Sequence[str],
        child_parent: Sequence[int],
        parent_unified: Tensor,
        child_delta_unified: Tensor,
        geometry: tuple[Tensor, Tensor],
        *,
        form: str = "dual",
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """The teacher of unified l_p [Q, d] and differences [R, d]; `geometry`: (Sigma^(1/2), Sigma^(-1/2)).

        `literal` is the first description's form: read and write are both the unit vector along Sigma^(1/2)
        l, because there vectors are whitened like covectors. Raises ValueError for a parent of length 0 or
        names that repeat.
        """
        if form not in FORMS:
            raise ValueError(f"teacher.init: found {form!r}, allowed: {', '.join(FORMS)}")
        owners = torch.tensor(list(child_parent), dtype=torch.int64)
        _check_names(parent_names, child_names, owners.tolist())
        lengths_Q = parent_unified.norm(dim=-1)
        if (lengths_Q == 0).any():
            name = parent_names[int(lengths_Q.argmin())]
            raise ValueError(f"teacher: found parent {name!r} of length 0, allowed: vectors that are not 0")
        sqrt_dd, inv_sqrt_dd = geometry
        writer_dd = inv_sqrt_dd if form == "dual" else sqrt_dd
        write_Qd = parent_unified @ writer_dd
        norms_Q1 = write_Qd.norm(dim=-1, keepdim=True)
        write_Qd = write_Qd / norms_Q1
        read_Qd = write_Qd.clone()
        if form == "dual":
            read_Qd = parent_unified @ sqrt_dd * norms_Q1 / lengths_Q.square().unsqueeze(1)
        delta_write_Rd = child_delta_unified @ writer_dd
        smallest = torch.finfo(torch.float64).tiny
        return cls(
            parent_names=tuple(parent_names),
            child_names=tuple(child_names),
            parent_unified=parent_unified,
            parent_read=read_Qd,
            parent_write=write_Qd,
            child_unified=parent_unified[owners] + child_delta_unified,
            child_delta_unified=child_delta_unified,
            child_delta_write=delta_write_Rd / delta_write_Rd.norm(dim=-1, keepdim=True).clamp_min(smallest),
            child_parent=owners,
            sigma_sqrt=sqrt_dd,
            sigma_inv_sqrt=inv_sqrt_dd,
            form=form,
            metadata=dict(metadata or {}),
        )

    def _rebuilt(self, parent_unified: Tensor, child_delta_unified: Tensor, **changes: str) -> "Teacher":
        form = changes.get("form", self.form)
        return Teacher.build(
            self.parent_names,
            self.child_names,
            self.child_parent.tolist(),
            parent_unified,
            child_delta_unified,
            (self.sigma_sqrt, self.sigma_inv_sqrt),
            form=form,
            metadata={**self.metadata, **changes},
        )

    def in_form(self, form: str) -> "Teacher":
        """The same concepts as a `dual` or `literal` teacher."""
        return self._rebuilt(self.parent_unified, self.child_delta_unified, form=form)

    def matched(self, parent_names: Sequence[str], child_names: Sequence[Sequence[str]]) -> "Teacher":
        """The rows of the named parents and, for each, of its named children, in that order.

        Raises ValueError for a name that the teacher does not hold. Names decide, never the order of a file.
        """
        parent_row = {name: row for row, name in enumerate(self.parent_names)}
        child_row = {
            (self.parent_names[parent], name): row
            for row, (parent, name) in enumerate(zip(self.child_parent.tolist(), self.child_names, strict=True))
        }
        pairs = [(p, c) for p, names in zip(parent_names, child_names, strict=True) for c in names]
        unknown = [p for p in parent_names if p not in parent_row] + [
            f"{parent}/{child}" for parent, child in pairs if (parent, child) not in child_row
        ]
        if unknown:
            raise ValueError(f"teacher: found no concept named {', '.join(unknown)}, allowed: the names in its file")
        owner = {name: row for row, name in enumerate(parent_names)}
        return Teacher.build(
            parent_names,
            [child for _, child in pairs],
            [owner[parent] for parent, _ in pairs],
            self.parent_unified[[parent_row[name] for name in parent_names]],
            self.child_delta_unified[[child_row[pair] for pair in pairs]],
            (self.sigma_sqrt, self.sigma_inv_sqrt),
            form=self.form,
            metadata=self.metadata,
        )

    def rotated(self, degrees: float, seed: int = 0) -> "Teacher":
        """All l_p and differences turned by one rotation, each by that angle: the teacher's shape, elsewhere."""
        rows_Nd = rotated_together(
            torch.cat([self.parent_unified, self.child_delta_unified]), degrees, seeded_generator("turned", seed)
        )
        parents_Qd, deltas_Rd = rows_Nd.split([self.n_parents, self.n_children])
        return self._rebuilt(parents_Qd, deltas_Rd, rotate_deg=repr(float(degrees)))

    def with_noise(self, degrees: float, seed: int = 0) -> "Teacher":
        """Every l_p and difference turned by that angle toward a random orthogonal direction of its own."""
        generator = seeded_generator("rotated", seed)
        parents = rotated_rows(self.parent_unified, degrees, generator)
        return self._rebuilt(
            parents,
            rotated_rows(self.child_delta_unified, degrees, generator),
            noise_deg=repr(float(degrees)),
        )

    def random_like(self, seed: int = 0) -> "Teacher":
        """Random directions of the same lengths: the control that knows nothing about the concepts."""
        generator = seeded_generator("random_like", seed)
        parents_Qd, deltas_Rd = (
            torch.nn.functional.normalize(torch.randn(rows.shape, generator=generator, dtype=torch.float64), dim=-1)
            * rows.norm(dim=-1, keepdim=True)
            for rows in (self.parent_unified, self.child_delta_unified)
        )
        return self._rebuilt(parents_Qd, deltas_Rd, estimator="random")

    def projectors(self, subspace_dim: int, n_children: int, energy: float = 0.85, seed: int = 0) -> Projectors:
        """Projectors and child rows for a model with C = `n_children` children per parent (docs/method.md
        §4).

        Slot j belongs to the parent's child j: it gets the unit coordinates of the child's difference in the
        parent's basis. Slots without a child, or with a difference of 0, get random unit coordinates,
        orthogonal to these while the subspace has room. The `literal` form uses one basis of the span of
        Sigma^(1/2) delta for both projectors. Raises ValueError when `subspace_dim` or `energy` is out of
        range.
        """
        parents_Qd, deltas_Rd, child_parent_R = self.parent_unified, self.child_delta_unified, self.child_parent
        sqrt_dd, inv_sqrt_dd = self.sigma_sqrt, self.sigma_inv_sqrt
        bases_Qsd = subspace_bases(parents_Qd, deltas_Rd, child_parent_R.tolist(), subspace_dim, energy, seed)
        if self.form == "literal":
            up_Qsd = torch.linalg.qr((bases_Qsd @ sqrt_dd).transpose(1, 2))[0].transpose(1, 2)
            down_Qsd, bases_Qsd, deltas_Rd = up_Qsd, up_Qsd, deltas_Rd @ sqrt_dd
        else:
            up_Qsd, down_Qsd = bases_Qsd @ inv_sqrt_dd, bases_Qsd @ sqrt_dd
        generator = seeded_generator("children", seed)
        unit_QCs = torch.zeros(len(parents_Qd), n_children, subspace_dim, dtype=torch.float64)
        seeded_QC = torch.zeros(len(parents_Qd), n_children, dtype=torch.bool)
        for parent in range(len(parents_Qd)):
            own_Kd = deltas_Rd[child_parent_R == parent][:n_children]
            given_Ks = own_Kd @ bases_Qsd[parent].T
            known_K = given_Ks.norm(dim=-1) > 1e-9 * own_Kd.norm(dim=-1)
            fresh_ns = completion(given_Ks[known_K], int((~known_K).sum()) + n_children - len(own_Kd), generator)
            seeded_QC[parent, : len(own_Kd)] = known_K
            unit_QCs[parent, seeded_QC[parent]] = torch.nn.functional.normalize(given_Ks[known_K], dim=-1)
            unit_QCs[parent, ~seeded_QC[parent]] = fresh_ns
        lengths_QC1 = (unit_QCs @ up_Qsd).norm(dim=-1, keepdim=True)
        return Projectors(down_Qsd, up_Qsd, unit_QCs * lengths_QC1, unit_QCs / lengths_QC1, seeded_QC)

    def save(self, path: Path | str) -> None:
        """Write `teacher.safetensors` (float64; docs/design.md, artifacts); names are JSON lists in its
        metadata."""
        tensors = {name: getattr(self, field) for name, field in _TENSORS.items()}
        names = {"parent_names": json.dumps(self.parent_names), "child_names": json.dumps(self.child_names)}
        write_tensors(path, tensors, {**self.metadata, **names, "form": self.form})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote. Raises ValueError when the file holds something else."""
        tensors, metadata = read_tensors(path)
        missing = [name for name in _TENSORS if name not in tensors]
        missing += [name for name in ("parent_names", "child_names", "form") if name not in metadata]
        if missing:
            raise ValueError(f"{path}: not a teacher file, missing {', '.join(missing)}")
        sizes = check_tensors(path, tensors, _LAYOUT)
        checked(metadata, _Metadata, path)
        parents, children = (tuple(json.loads(metadata.pop(f"{kind}_names"))) for kind in ("parent", "child"))
        if (len(parents), len(children)) != (sizes["Q"], sizes["R"]):
            found = f"names of {len(parents)} parents and {len(children)} children"
            raise ValueError(f"{path}: found {found}, allowed: one for each of {sizes['Q']} and {sizes['R']} rows")
        owners = tensors["child.parent"].tolist()
        if not all(0 <= owner < len(parents) for owner in owners):
            raise ValueError(f"{path}: child.parent: found {shown(owners)}, allowed: 0 to {len(parents) - 1}")
        _check_names(parents, children, owners)
        form = metadata.pop("form")
        fields = {field: tensors[name] for name, field in _TENSORS.items()}
        return cls(parent_names=parents, child_names=children, form=form, metadata=metadata, **fields)


_TENSORS = {
    "parent.unified": "parent_unified",
    "parent.read": "parent_read",
    "parent.write": "parent_write",
    "child.unified": "child_unified",
    "child.delta_unified": "child_delta_unified",
    "child.delta_write": "child_delta_write",
    "child.parent": "child_parent",
    "geometry.sigma_sqrt": "sigma_sqrt",
    "geometry.sigma_inv_sqrt": "sigma_inv_sqrt",
}
_LAYOUT = {
    **dict.fromkeys(("parent.unified", "parent.read", "parent.write"), ((torch.float64,), ("Q", "d"))),
    **dict.fromkeys(("child.unified", "child.delta_unified", "child.delta_write"), ((torch.float64,), ("R", "d"))),
    "child.parent": ((torch.int64,), ("R",)),
    **dict.fromkeys(("geometry.sigma_sqrt", "geometry.sigma_inv_sqrt"), ((torch.float64,), ("d", "d"))),
}


class _Metadata(TypedDict):
    """What a teacher file says beside its tensors, as far as `load` needs it."""

    parent_names: Json[Annotated[list[str], Field(min_length=1)]]
    child_names: Json[list[str]]
    form: Literal["dual", "literal"]


def _check_names(parent_names: Sequence[str], child_names: Sequence[str], child_parent: Sequence[int]) -> None:
    assert len(child_names) == len(child_parent)
    pairs = [f"{parent_names[p]}/{c}" for p, c in zip(child_parent, child_names, strict=True)]
    for names in (list(parent_names), pairs):
        repeated = [name for row, name in enumerate(names) if name in names[:row]]
        if repeated:
            raise ValueError(f"teacher: found the name {repeated[0]!r} twice, allowed: names that differ")


def concept_words(concepts: Concepts) -> tuple[list[list[list[int]]], list[int]]:
    """(per child row its words as token lists, parent row of every child row): what `collect_evidence` takes."""
    words = [
        [list(child.tokens[word]) for fold in FOLDS for word in child.words[fold]]
        for parent in concepts.parents
        for child in parent.children
    ]
    return words, list(concepts.child_parent_R)


def extract_teacher(
    unembedding: Tensor,
    geometry: CausalGeometry,
    concepts: Concepts,
    *,
    estimator: str = "mean",
    folds: Sequence[str] = ("train",),
    balanced: bool = False,
    named: slice | Tensor = ALL,
    metadata: Mapping[str, str] | None = None,
) -> Teacher:
    """The teacher from tokens: l of every parent (union of its children's tokens) and child, words of `folds`
    only.

    Args: unembedding [V, d]; geometry its metric; balanced: l_p minus the mean of all l_p (tokens count alike
    anyway); named: index of the rows that stand for a token; metadata: further strings to keep (model,
    model_revision, hook).
    """
    child_parent = list(concepts.child_parent_R)
    child_tokens = concepts.child_tokens(folds=tuple(folds))
    for name, tokens in zip(_child_names(concepts), child_tokens, strict=True):
        if not tokens:
            raise ValueError(f"concepts: found no tokens of {name} in folds {', '.join(folds)}, allowed: some")
    parent_tokens: list[list[int]] = [[] for _ in concepts.parents]
    for tokens, parent in zip(child_tokens, child_parent, strict=True):
        parent_tokens[parent] += tokens
    estimate = ConceptEstimator(unembedding, geometry, estimator, named)
    parents_Qd = estimate.concept_vectors(parent_tokens)
    deltas_Rd = estimate.concept_vectors(child_tokens) - parents_Qd[child_parent]
    if balanced:
        parents_Qd = parents_Qd - parents_Qd.mean(dim=0)
    described = {**(metadata or {}), "source": "tokens", "estimator": estimator, "folds": ",".join(folds)}
    return _assembled(concepts, parents_Qd, deltas_Rd, geometry, described)


def extract_activation_teacher(
    stats: ActivationClassStats,
    concepts: Concepts,
    *,
    shrinkage: float = 0.05,
    metric: str = "causal",
    seed: int = 0,
    class_child: Sequence[int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Teacher:
    """The teacher at an inner hook: l = S^(-1/2) m in the residual_covariance geometry of the within-class
    covariance S, or in another `metric` made of it (see `ActivationClassStats.geometry`).

    So in the first D_p = m_p/|m_p| and E_p is proportional to S^-1 m_p. Parents without rows, or with all rows there
    are, have no m_p: the teacher leaves them and their children out. Children without rows keep a
    difference of 0 (they seed nothing). Both get a warning and are in the metadata (`unseen_parents`,
    `unseen_children`; the latter of parents that are there). Raises ValueError when no parent is left.
    """
    child_parent, n_parents = list(concepts.child_parent_R), concepts.n_parents
    if class_child is None:
        of_parents_Qd, of_children_Rd = stats.parent_differences(child_parent, n_parents), stats.class_differences()
    else:
        of_parents_Qd = stats.balanced_differences([child_parent[row] for row in class_child], n_parents)
        of_children_Rd = stats.balanced_differences(class_child, concepts.n_children)
        stats = stats.merged(class_child, concepts.n_children)
    geometry = stats.geometry(shrinkage, metric, seed)
    parents_Qd = of_parents_Qd @ geometry.sigma_sqrt
    deltas_Rd = of_children_Rd @ geometry.sigma_sqrt - parents_Qd[child_parent]
    seen_Q = parents_Qd.any(dim=1)
    unseen_parents = [concepts.parents[row].name for row in (~seen_Q).nonzero().flatten().tolist()]
    if not seen_Q.any():
        raise ValueError(f"activations: found no rows of any of {len(unseen_parents)} parents, allowed: rows of some")
    if unseen_parents:
        names = ", ".join(unseen_parents)
        warnings.warn(f"parents without rows are left out of the teacher: {names}", stacklevel=2)
    in_teacher_R = seen_Q[child_parent]
    seen = Concepts([parent for parent, kept in zip(concepts.parents, seen_Q.tolist(), strict=True) if kept])
    parents_Qd, deltas_Rd, counts_R = parents_Qd[seen_Q], deltas_Rd[in_teacher_R], stats.counts[in_teacher_R]
    if class_child is not None:
        parents_Qd = parents_Qd - parents_Qd.mean(dim=0)
    unseen_R = counts_R == 0
    unseen = [name for name, missing in zip(_child_names(seen), unseen_R.tolist(), strict=True) if missing]
    if unseen:
        warnings.warn(f"{len(unseen)} children have no rows and seed nothing", stacklevel=2)
    deltas_Rd = deltas_Rd.masked_fill(unseen_R.unsqueeze(1), 0.0)
    described = {
        **(metadata or {}),
        "source": "activations",
        "estimator": "class_mean",
        "rows": str(stats.total),
        "unseen_parents": json.dumps(unseen_parents),
        "unseen_children": json.dumps(unseen),
    }
    return _assembled(seen, parents_Qd, deltas_Rd, geometry, described)


def _child_names(concepts: Concepts) -> list[str]:
    return [f"{parent.name}/{child.name}" for parent in concepts.parents for child in parent.children]


def _assembled(
    concepts: Concepts,
    parents_Qd: Tensor,
    deltas_Rd: Tensor,
    geometry: CausalGeometry,
    metadata: Mapping[str, str],
) -> Teacher:
    return Teacher.build(
        [parent.name for parent in concepts.parents],
        [child.name for parent in concepts.parents for child in parent.children],
        list(concepts.child_parent_R),
        parents_Qd.cpu(),
        deltas_Rd.cpu(),
        (geometry.sigma_sqrt.cpu(), geometry.sigma_inv_sqrt.cpu()),
        metadata={**metadata, "metric": geometry.metric, "shrinkage": repr(geometry.shrinkage)},
    )
