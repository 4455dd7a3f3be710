"""Hierarchy measures against codes and atoms that are known."""

import math

import numpy as np
import pytest
import torch
from fakes import Store, write_store
from models import factored
from tiny import concepts

from polytope_hsae.config import TopKConfig
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.concepts import ConceptData
from polytope_hsae.evaluation.firings import MIN_PARENT_ROWS, Firings, count_firings, firing_metrics
from polytope_hsae.evaluation.hierarchy import Probes, child_probes, probe_metrics
from polytope_hsae.evaluation.row_codes import row_codes
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE


def codes(parents, children) -> Codes:
    """Codes of rows given as lists of active parents and of active children; C = 2."""
    columns = []
    for rows in (parents, children):
        slots = max(map(len, rows))
        index = torch.tensor([[*row, *[0] * (slots - len(row))] for row in rows]).reshape(len(rows), slots)
        columns += [index, torch.tensor([[1.0] * len(row) + [0.0] * (slots - len(row)) for row in rows])]
    return Codes(*columns)


def test_firings_of_planted_codes_by_hand():
    """Parent 0 on in 60 of 100 rows, its child 0 in 30 of them, its child 1 in none; parent 1 in 20, child 3 in 10."""
    found = Firings(3, 2)
    found.add(codes([[0]] * 60, [[0]] * 30 + [[]] * 30))
    found.add(codes([[1]] * 20 + [[]] * 20, [[3]] * 10 + [[]] * 30))
    assert (found.rows, found.parents_P.tolist()) == (100, [60, 20, 0])
    assert found.children_R.tolist() == [30, 0, 0, 10, 0, 0]
    assert (found.l0_parents, found.l0_children) == (0.8, 0.4)
    assert found.dead_parents == pytest.approx(1 / 3)
    assert found.dead_children == pytest.approx(4 / 6)
    metrics = firing_metrics(found)
    assert metrics["parent_given_child"].value == 1.0
    assert metrics["parent_given_child"].chance == pytest.approx((30 * 0.6 + 10 * 0.2) / 40)
    assert metrics["parent_given_child"].n == 40
    # Only parent 0 is on often enough: its children's rates are 0.5 and 0.
    assert MIN_PARENT_ROWS == 50
    assert metrics["child_given_parent"].value == pytest.approx(0.25)
    assert metrics["child_given_parent_q75"].value == pytest.approx(0.375)
    assert metrics["child_given_parent"].chance == pytest.approx(0.15)
    assert metrics["child_given_parent"].n == 2
    assert metrics["max_firing_rate"].value == 0.6
    assert metrics["max_firing_rate"].chance == pytest.approx(0.8 / 3)
    assert metrics["entropy"].value == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert metrics["entropy"].chance == pytest.approx(math.log(3))


def test_a_child_without_its_parent_is_seen():
    """The share is counted: codes that break the rule say so."""
    found = Firings(3, 2)
    found.add(codes([[0], [1], [0], [2]], [[0], [0], [1], [3]]))  # rows 1 and 3 have a child of another parent
    assert firing_metrics(found)["parent_given_child"].value == 0.5
    assert firing_metrics(found)["child_given_parent"].value is None
    assert "50 rows" in firing_metrics(found)["child_given_parent"].why


def test_a_flat_model_has_rates_and_no_hierarchy():
    found = Firings(4, 0)
    found.add(codes([[0, 1], [0]], [[], []]))
    metrics = firing_metrics(found)
    assert found.dead_children is None
    assert metrics["max_firing_rate"].value == 1.0
    assert {metrics[name].why for name in ("parent_given_child", "child_given_parent")} == {
        "a flat model has no children"
    }
    nothing = probe_metrics(TopKSAE(TopKConfig(n_latents=4, k=1), 3).eval(), None, None)
    assert {metric.why for metric in nothing.values()} == {"a flat model has no children"}


def planted(angle: float) -> tuple[HierarchicalSAE, Store, Probes]:
    """Two parents with two children each; every child concept adds its own atom to its parent's direction.

    A probe lies between the child's atom and the parent's direction, `angle` degrees from the atom.
    """
    d = 12
    model = HierarchicalSAE(factored(
        n_parents=2, topk_parent=1, n_children_per_parent=2, topk_child_total=1, subspace_dim=2, gate="hard"
    ), d, "none")  # fmt: skip
    eye = torch.eye(d)
    with torch.no_grad():
        model.D.copy_(eye[:2])
        model.E.copy_(eye[:2])
        model.Up.copy_(torch.stack([eye[2:4], eye[4:6]]))
        model.Down.copy_(model.Up)
        model.G.copy_(torch.eye(2).expand(2, 2, 2))
        model.F.copy_(model.G)
        for bias in (model.b_E, model.b_F, model.b_dec):
            bias.zero_()
    atoms = torch.cat([eye[2:4], eye[4:6]])
    owner = torch.tensor([0, 0, 1, 1])
    rows = (eye[owner] + atoms).repeat_interleave(10, dim=0)
    radians = math.radians(angle)
    probe = (math.cos(radians) * atoms + math.sin(radians) * eye[owner]).double()
    labels = torch.arange(4).repeat_interleave(10)
    return (
        model.eval(),
        Store(train={"acts": rows}),
        Probes(probe, torch.eye(d, dtype=torch.float64), torch.arange(40), labels),
    )


@pytest.mark.parametrize("angle", [0, 30, 45, 60])
def test_probes_between_child_and_parent_have_the_planted_cosines(angle):
    model, store, probes = planted(angle)
    found = probe_metrics(model, row_codes(model, store, "train", np.arange(40)).children, probes)
    child, parent = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    assert found["probe_child"].value == pytest.approx(child, abs=1e-6)
    assert found["probe_parent"].value == pytest.approx(parent, abs=1e-6)
    assert found["probe_min"].value == pytest.approx(min(child, parent), abs=1e-6)
    assert found["probe_min"].n == 4
    assert found["probe_child"].chance < 0.5 * child
    counted = count_firings(model, store, "train")
    assert (counted.parents_P.tolist(), counted.children_R.tolist()) == ([20, 20], [10, 10, 10, 10])


def test_concepts_without_a_child_latent_are_left_out():
    model, store, probes = planted(45)
    with torch.no_grad():
        model.b_F.fill_(-100.0)  # no child fires
    found = probe_metrics(model, row_codes(model, store, "train", np.arange(40)).children, probes)
    assert {metric.value for metric in found.values()} == {None}
    assert "0 child concepts" in found["probe_min"].why


@pytest.fixture
def labelled(tmp_path) -> ActivationStore:
    """Rows whose token says which child concept they carry: class means apart, one direction with more noise."""
    tree = concepts()
    generator = np.random.default_rng(0)
    d, n = 8, 4000
    token = torch.from_numpy(generator.integers(1, 60, n)).int()
    child_of = tree.token_to_child(vocab_size=64, folds=("train",))
    means = torch.from_numpy(generator.normal(size=(tree.n_children + 1, d))).float()
    noise = torch.from_numpy(generator.normal(size=(n, d))).float() * torch.tensor([5.0] + [1.0] * (d - 1))
    acts = means[child_of[token.long()].long()] + noise
    columns = {"acts": acts, "token": token}
    return ActivationStore.open(write_store(tmp_path, dict.fromkeys(("train", "val", "test"), columns), 1500))


def test_probes_are_those_of_linear_discriminant_analysis(labelled):
    tree = concepts()
    data = ConceptData(labelled, tree, "current_token", 64, shrinkage=0.0)
    probes, _ = child_probes(data, rows_per_child=20)
    acts = labelled.acts("train", torch.arange(4000)).double()
    child = tree.token_to_child(vocab_size=64, folds=("train",))[labelled.column("train", "token").long()].long()
    class_N = torch.where(child < 0, tree.n_children, child)
    means = torch.stack([acts[class_N == c].mean(0) for c in range(tree.n_children + 1)])
    within = acts - means[class_N]
    covariance = within.T @ within / len(acts)
    covector = torch.linalg.solve(covariance, (means[:-1] - acts.mean(0)).T).T
    # In the unified coordinate a covector w is S^(1/2) w and a vector a is S^(-1/2) a: their product is w.a.
    atom = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    paired = covector @ atom.T
    norms = (covector @ covariance * covector).sum(1).sqrt()
    torch.testing.assert_close(probes.probe_Qd @ (atom @ probes.vector_root_dd).T, paired / norms[:, None])
    difference = (means[:-1] - acts.mean(0)) @ probes.vector_root_dd
    cosine = torch.nn.functional.cosine_similarity(probes.probe_Qd, difference, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))  # an atom along the mean difference has cosine 1
    assert torch.bincount(probes.child_N).tolist() == [20] * tree.n_children
    assert torch.equal(child[probes.row_N], probes.child_N)
