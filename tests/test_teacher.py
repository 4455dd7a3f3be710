"""The teacher's read and write directions, projectors, controls and file (docs/method.md §4)."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polytope_hsae.data.concepts import Child, Concepts, Parent
from polytope_hsae.fileio import read_tensors, sha256_file, write_tensors
from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.estimators import ActivationClassStats, ConceptEstimator
from polytope_hsae.teacher import Teacher, concept_words, extract_activation_teacher, extract_teacher

WIDTH = 32


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_concepts(order: tuple[int, ...] = (0, 1, 2)) -> Concepts:
    """Three parents of 3, 4 and 5 children, four words each (two for training), two tokens per word."""
    parents = []
    for p in order:
        children = []
        for c in range(3 + p):
            words = [f"w{p}.{c}.{w}" for w in range(4)]
            first = 100 * p + 8 * c
            tokens = {word: [first + 2 * w, first + 2 * w + 1] for w, word in enumerate(words)}
            children.append(
                Child(f"child{c}", None, {"train": words[:2], "val": [words[2]], "test": [words[3]]}, tokens)
            )
        parents.append(Parent(f"parent{p}", None, children))
    return Concepts(parents)


@pytest.fixture(scope="module")
def unembedding() -> Tensor:
    return randn(400, WIDTH) @ randn(WIDTH, WIDTH, seed=1) + 3


@pytest.fixture(scope="module")
def geometry(unembedding: Tensor) -> CausalGeometry:
    return CausalGeometry(unembedding)


@pytest.fixture(scope="module")
def teacher(unembedding: Tensor, geometry: CausalGeometry) -> Teacher:
    return extract_teacher(unembedding, geometry, make_concepts(), metadata={"model_revision": "abc"})


def diagonal(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def test_vectors_come_from_train_words(unembedding: Tensor, geometry: CausalGeometry, teacher: Teacher) -> None:
    estimate = ConceptEstimator(unembedding, geometry)
    child = estimate.concept_vectors([[108, 109, 110, 111]])[0]
    parent = estimate.concept_vectors([[100 + 8 * c + t for c in range(4) for t in range(4)]])[0]
    row = teacher.child_names.index("child1", 3)
    torch.testing.assert_close(teacher.child_unified[row], child)
    torch.testing.assert_close(teacher.parent_unified[1], parent)
    torch.testing.assert_close(teacher.child_delta_unified[row], child - parent)
    assert teacher.child_parent.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert (teacher.n_parents, teacher.n_children) == (3, 12)
    everything = extract_teacher(unembedding, geometry, make_concepts(), folds=("train", "val", "test"))
    assert not torch.allclose(everything.parent_unified, teacher.parent_unified)
    assert everything.metadata["folds"] == "train,val,test"


def test_read_and_write_are_dual(teacher: Teacher, geometry: CausalGeometry) -> None:
    torch.testing.assert_close(teacher.parent_write.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(diagonal(teacher.parent_read, teacher.parent_write), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        torch.cosine_similarity(teacher.child_delta_write, teacher.child_delta_unified @ geometry.sigma_inv_sqrt),
        torch.ones(12, dtype=torch.float64),
    )
    # (E D^T)_ij |l_i|^2 n_j / n_i = <l_i, l_j>
    n = (teacher.parent_unified @ geometry.sigma_inv_sqrt).norm(dim=1)
    product = teacher.parent_read @ teacher.parent_write.T
    scaled = product * teacher.parent_unified.square().sum(1, keepdim=True) * n / n.unsqueeze(1)
    torch.testing.assert_close(scaled, teacher.parent_unified @ teacher.parent_unified.T)


def test_literal_form_reads_and_writes_one_direction(teacher: Teacher, geometry: CausalGeometry) -> None:
    literal = teacher.in_form("literal")
    expected = torch.nn.functional.normalize(teacher.parent_unified @ geometry.sigma_sqrt, dim=1)
    torch.testing.assert_close(literal.parent_write, expected)
    torch.testing.assert_close(literal.parent_read, expected)
    assert literal.form == "literal"
    torch.testing.assert_close(literal.in_form("dual").parent_read, teacher.parent_read)
    with pytest.raises(ValueError, match=r"teacher\.init: found 'tied', allowed: dual, literal"):
        teacher.in_form("tied")


@pytest.mark.parametrize("form", ["dual", "literal"])
def test_projectors(teacher: Teacher, form: str) -> None:
    teacher = teacher.in_form(form)
    down, up, encoder, decoder, seeded = teacher.projectors(8, 6, energy=1.0, seed=3)
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    torch.testing.assert_close(down @ up.transpose(1, 2), eye)
    atoms = decoder @ up
    torch.testing.assert_close(atoms.norm(dim=-1), torch.ones(3, 6, dtype=torch.float64))
    torch.testing.assert_close(diagonal(encoder, decoder), torch.ones(3, 6, dtype=torch.float64))
    assert seeded.sum(1).tolist() == [3, 4, 5]
    torch.testing.assert_close(atoms[seeded], teacher.child_delta_write)
    # The rows without a child are orthogonal to all others.
    for p in range(3):
        units = torch.nn.functional.normalize(decoder[p], dim=-1)
        free = units[~seeded[p]]
        torch.testing.assert_close(free @ free.T, torch.eye(len(free), dtype=torch.float64))
        assert (free @ units[seeded[p]].T).abs().max() < 1e-9
    again = teacher.projectors(8, 6, energy=1.0, seed=3)
    assert all(torch.equal(a, b) for a, b in zip((down, up, encoder, decoder), again[:4], strict=True))
    assert not torch.allclose(down, teacher.projectors(8, 6, energy=1.0, seed=4).down)


def test_projectors_with_more_or_fewer_slots_than_room(teacher: Teacher) -> None:
    few = teacher.projectors(8, 2, energy=1.0)
    assert few.seeded.all()
    torch.testing.assert_close((few.child_decoder @ few.up)[1], teacher.child_delta_write[3:5])
    many = teacher.projectors(4, 20)
    assert many.seeded.sum(1).tolist() == [3, 4, 5]
    torch.testing.assert_close((many.child_decoder @ many.up).norm(dim=-1), torch.ones(3, 20, dtype=torch.float64))
    assert torch.isfinite(many.child_encoder).all()


def test_projectors_of_a_parent_without_children(geometry: CausalGeometry) -> None:
    none, roots = torch.zeros(0, WIDTH, dtype=torch.float64), (geometry.sigma_sqrt, geometry.sigma_inv_sqrt)
    result = Teacher.build(["alone"], [], [], randn(1, WIDTH), none, roots).projectors(3, 5)
    assert not result.seeded.any()
    atoms = result.child_decoder @ result.up
    torch.testing.assert_close(atoms.norm(dim=-1), torch.ones(1, 5, dtype=torch.float64))


def test_rows_are_matched_by_name(unembedding: Tensor, geometry: CausalGeometry, teacher: Teacher) -> None:
    permuted = extract_teacher(unembedding, geometry, make_concepts((2, 0, 1)))
    children = [[f"child{c}" for c in range(3 + p)] for p in range(3)]
    back = permuted.matched([f"parent{p}" for p in range(3)], children)
    for field in (
        "parent_unified",
        "parent_read",
        "parent_write",
        "child_unified",
        "child_delta_write",
        "child_parent",
    ):
        torch.testing.assert_close(getattr(back, field), getattr(teacher, field))
    assert back.child_names == teacher.child_names
    part = teacher.matched(["parent2"], [["child4", "child0"]])
    torch.testing.assert_close(part.child_delta_unified, teacher.child_delta_unified[[11, 7]])
    with pytest.raises(ValueError, match="no concept named parent0/child9, allowed"):
        teacher.matched(["parent0"], [["child9"]])
    with pytest.raises(ValueError, match="found the name 'parent0' twice"):
        teacher.matched(["parent0", "parent0"], [["child0"], ["child1"]])


def test_file_keeps_everything_and_equal_bytes(tmp_path: Path, teacher: Teacher) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    teacher.save(paths[0])
    teacher.save(paths[1])
    loaded = Teacher.load(paths[0])
    loaded.save(paths[2])
    assert len({sha256_file(path) for path in paths}) == 1
    tensors, metadata = read_tensors(paths[0])
    parent_names, child_names = (
        ("unified", "read", "write"),
        ("unified", "delta_unified", "delta_write", "parent"),
    )
    assert {f"parent.{name}" for name in parent_names} <= set(tensors)
    assert {f"child.{name}" for name in child_names} <= set(tensors)
    assert tensors["parent.read"].dtype == torch.float64
    assert json.loads(metadata["parent_names"]) == ["parent0", "parent1", "parent2"]
    kept = {key: metadata[key] for key in ("estimator", "metric", "shrinkage", "model_revision", "folds")}
    expected = ("mean", "causal", "0.05", "abc", "train")
    assert tuple(kept.values()) == expected
    assert (loaded.parent_names, loaded.child_names) == (teacher.parent_names, teacher.child_names)
    assert loaded.form == "dual"
    assert torch.equal(loaded.parent_read, teacher.parent_read)
    teacher.in_form("literal").save(paths[1])
    assert Teacher.load(paths[1]).form == "literal"
    del tensors["child.parent"], metadata["form"]
    write_tensors(paths[1], tensors, metadata)
    with pytest.raises(ValueError, match=r"not a teacher file, missing child\.parent, form"):
        Teacher.load(paths[1])


def test_rotated_teacher_keeps_lengths_and_duality(teacher: Teacher) -> None:
    turned = teacher.with_noise(25.0, seed=1)
    for field in ("parent_unified", "child_delta_unified"):
        before, after = getattr(teacher, field), getattr(turned, field)
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
        cosine = torch.cosine_similarity(before, after)
        torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.radians(25))))
    torch.testing.assert_close(diagonal(turned.parent_read, turned.parent_write), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        turned.child_unified, turned.parent_unified[turned.child_parent] + turned.child_delta_unified
    )
    torch.testing.assert_close(teacher.with_noise(0.0).parent_read, teacher.parent_read)
    assert turned.metadata["noise_deg"] == "25.0"


@pytest.mark.parametrize("degrees", [15.0, 30.0, 60.0])
def test_a_turned_teacher_keeps_its_shape_and_every_vector_turns_by_the_angle(teacher: Teacher, degrees: float) -> None:
    turned = teacher.rotated(degrees, seed=1)
    before = torch.cat([teacher.parent_unified, teacher.child_delta_unified])
    after = torch.cat([turned.parent_unified, turned.child_delta_unified])
    torch.testing.assert_close(after @ after.T, before @ before.T)
    cosine = torch.cosine_similarity(before, after)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.radians(degrees))))
    torch.testing.assert_close(diagonal(turned.parent_read, turned.parent_write), torch.ones(3, dtype=torch.float64))
    assert turned.metadata["rotate_deg"] == str(degrees)
    assert not torch.allclose(turned.parent_unified, teacher.rotated(degrees, seed=2).parent_unified)


def test_random_teacher_has_the_lengths_only(teacher: Teacher) -> None:
    random = teacher.random_like(seed=2)
    torch.testing.assert_close(random.parent_unified.norm(dim=1), teacher.parent_unified.norm(dim=1))
    torch.testing.assert_close(random.child_delta_unified.norm(dim=1), teacher.child_delta_unified.norm(dim=1))
    assert torch.cosine_similarity(random.parent_unified, teacher.parent_unified).abs().max() < 0.7
    assert torch.equal(random.parent_unified, teacher.random_like(seed=2).parent_unified)
    assert not torch.equal(random.parent_unified, teacher.random_like(seed=3).parent_unified)
    assert random.metadata["estimator"] == "random"
    turned = random.with_noise(40.0, seed=2)  # the same seed draws other numbers
    cosine = torch.cosine_similarity(random.parent_unified, turned.parent_unified)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.radians(40))))


def activations(skip: int | None = None) -> tuple[ActivationClassStats, Tensor, Tensor]:
    labels = torch.arange(1300) % 13 - 1
    if skip is not None:
        labels[labels == skip] = -1
    acts = randn(1300, WIDTH, seed=5) @ randn(WIDTH, WIDTH, seed=6) + 50
    acts += torch.cat([randn(12, WIDTH, seed=7) * 4, torch.zeros(1, WIDTH, dtype=torch.float64)])[labels]
    stats = ActivationClassStats(12, WIDTH)
    stats.update(acts, labels)
    return stats, acts, labels


def test_activation_teacher_writes_means_and_reads_by_the_inverse_covariance() -> None:
    stats, acts, labels = activations()
    teacher = extract_activation_teacher(stats, make_concepts(), shrinkage=0.1, metadata={"hook": "layers.3"})
    mean = acts.mean(0)
    m_p = acts[(labels >= 3) & (labels < 7)].mean(0) - mean
    covariance = stats.within_covariance()
    shrunk = 0.9 * covariance + 0.1 * covariance.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(teacher.parent_write[1], m_p / m_p.norm())
    w = torch.linalg.solve(shrunk, m_p)
    torch.testing.assert_close(teacher.parent_read[1], w / (w @ m_p) * m_p.norm())
    torch.testing.assert_close(diagonal(teacher.parent_read, teacher.parent_write), torch.ones(3, dtype=torch.float64))
    delta = acts[labels == 4].mean(0) - mean - m_p
    torch.testing.assert_close(teacher.child_delta_write[4], delta / delta.norm())
    assert (teacher.metadata["metric"], teacher.metadata["hook"]) == ("residual_covariance", "layers.3")


def test_a_euclidean_activation_teacher_reads_what_it_writes() -> None:
    stats, _, _ = activations()
    causal = extract_activation_teacher(stats, make_concepts())
    euclidean = extract_activation_teacher(stats, make_concepts(), metric="identity")
    torch.testing.assert_close(euclidean.parent_write, causal.parent_write)  # both write the class mean
    torch.testing.assert_close(euclidean.parent_read, euclidean.parent_write)
    assert torch.cosine_similarity(causal.parent_read, causal.parent_write).max() < 0.9
    assert euclidean.metadata["metric"] == "identity"
    diagonal_metric = extract_activation_teacher(stats, make_concepts(), metric="diagonal")
    scale = causal.sigma_sqrt.square().sum(1)  # the diagonal of Sigma
    torch.testing.assert_close(diagonal_metric.sigma_sqrt, scale.sqrt().diag())


def test_a_balanced_activation_teacher_weighs_tokens_alike_and_starts_from_the_mean_parent() -> None:
    acts, labels = randn(2000, WIDTH, seed=5) + 50, torch.arange(2000) % 25 % 14 - 1  # classes -1 to 9 have two shares
    means_of_tokens = randn(13, WIDTH, seed=7) * 4
    acts = acts + torch.cat([means_of_tokens, torch.zeros(1, WIDTH, dtype=torch.float64)])[labels]
    stats = ActivationClassStats(13, WIDTH)
    stats.update(acts, labels)
    child_of_token = [*range(12), 4]  # child 4, of parent 1, has two tokens; the second one is seen half as often
    teacher = extract_activation_teacher(stats, make_concepts(), class_child=child_of_token)
    mean_T = torch.stack([acts[labels == token].mean(0) for token in range(13)])
    parents = torch.stack([mean_T[[0, 1, 2]].mean(0), mean_T[[3, 4, 5, 6, 12]].mean(0), mean_T[7:12].mean(0)])
    expected = torch.nn.functional.normalize(parents - parents.mean(0), dim=1)
    torch.testing.assert_close(teacher.parent_write, expected)
    torch.testing.assert_close(diagonal(teacher.parent_read, teacher.parent_write), torch.ones(3, dtype=torch.float64))
    delta = (mean_T[4] + mean_T[12]) / 2 - parents[1]  # of child and parent, wherever they are seen from
    torch.testing.assert_close(teacher.child_delta_write[4], delta / delta.norm())
    rows = extract_activation_teacher(stats.merged(child_of_token, 12), make_concepts())
    torch.testing.assert_close(teacher.sigma_sqrt, rows.sigma_sqrt)
    assert torch.cosine_similarity(teacher.parent_write, rows.parent_write).max() < 0.999


def test_a_balanced_teacher_from_tokens_starts_from_the_mean_parent(
    unembedding: Tensor, geometry: CausalGeometry, teacher: Teacher
) -> None:
    balanced = extract_teacher(unembedding, geometry, make_concepts(), balanced=True)
    mean = teacher.parent_unified.mean(0)
    torch.testing.assert_close(balanced.parent_unified, teacher.parent_unified - mean)
    torch.testing.assert_close(balanced.child_delta_unified, teacher.child_delta_unified)


def test_unseen_children_seed_nothing() -> None:
    stats, _, _ = activations(skip=4)
    with pytest.warns(UserWarning, match="1 children have no rows and seed nothing"):
        teacher = extract_activation_teacher(stats, make_concepts())
    assert json.loads(teacher.metadata["unseen_children"]) == ["parent1/child1"]
    assert not teacher.child_delta_unified[4].any()
    projectors = teacher.with_noise(10.0).projectors(6, 5)
    assert projectors.seeded[1].tolist() == [True, False, True, True, False]
    assert torch.isfinite(projectors.child_decoder).all()


def test_unseen_parents_are_left_out_by_name() -> None:
    _, acts, labels = activations()
    stats = ActivationClassStats(12, WIDTH)
    stats.update(acts, torch.where((labels >= 3) & (labels < 7), -1, labels))
    with pytest.warns(UserWarning, match=r"parents without rows are left out of the teacher: parent1$"):
        teacher = extract_activation_teacher(stats, make_concepts())
    assert teacher.parent_names == ("parent0", "parent2")
    assert teacher.child_parent.tolist() == [0] * 3 + [1] * 5
    assert teacher.child_names == tuple(f"child{c}" for c in (0, 1, 2, 0, 1, 2, 3, 4))
    assert json.loads(teacher.metadata["unseen_parents"]) == ["parent1"]
    assert json.loads(teacher.metadata["unseen_children"]) == []
    full = extract_activation_teacher(activations()[0], make_concepts())
    # D_p is the class mean's direction, whatever the covariance: the rows are those of the full teacher.
    torch.testing.assert_close(teacher.parent_write, full.parent_write[[0, 2]])
    assert json.loads(full.metadata["unseen_parents"]) == []
    with pytest.raises(ValueError, match="no concept named parent1, parent1/child0, allowed"):
        teacher.matched(["parent1"], [["child0"]])

    for labels_N in (torch.full((50,), -1), torch.zeros(50, dtype=torch.int64)):  # none labelled, and all one class
        empty = ActivationClassStats(12, WIDTH)
        empty.update(randn(50, WIDTH), labels_N)
        with pytest.raises(ValueError, match="found no rows of any of 3 parents, allowed: rows of some"):
            extract_activation_teacher(empty, make_concepts())


def test_words_for_the_evidence_and_missing_folds(unembedding: Tensor, geometry: CausalGeometry) -> None:
    words, child_parent = concept_words(make_concepts())
    assert words[0] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert child_parent == [0] * 3 + [1] * 4 + [2] * 5
    bare = Concepts([Parent("p", None, [Child("c", None, {"train": ["a"], "val": [], "test": []}, {"a": [1]})])])
    with pytest.raises(ValueError, match="found no tokens of p/c in folds val"):
        extract_teacher(unembedding, geometry, bare, folds=("val",))
