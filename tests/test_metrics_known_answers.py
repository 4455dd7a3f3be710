"""Every metric of a model: its known answer on planted codes, and its chance level where nothing is planted."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from fakes import Store, sparse
from models import factored

from polytope_hsae.config import TopKConfig
from polytope_hsae.evaluation.absorption import ParentProbes, absorption_metrics, parent_probes
from polytope_hsae.evaluation.bootstrap import Resampling, bootstrap_quantile
from polytope_hsae.evaluation.concepts import ConceptData, concept_metrics, evaluate_concepts
from polytope_hsae.evaluation.edges import edge_metrics, match_children
from polytope_hsae.evaluation.firings import Firings, firing_metrics, norm_metrics, usage_metrics
from polytope_hsae.evaluation.hierarchy import Probes, evaluate_structure, labelled_sample, probe_metrics
from polytope_hsae.evaluation.reconstruction import evaluate_reconstruction
from polytope_hsae.evaluation.row_codes import SparseActivations, row_codes
from polytope_hsae.evaluation.splitting import split_metrics
from polytope_hsae.geometry.estimators import ActivationClassStats
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE

D = 16
EYE = torch.eye(D)


def flat(reads, writes) -> TopKSAE:
    """A flat model with these rows of E and, at unit norm, of D."""
    model = TopKSAE(TopKConfig(n_latents=len(reads), k=3), D, "none")
    with torch.no_grad():
        model.E.copy_(reads)
        model.D.copy_(torch.nn.functional.normalize(writes, dim=1))
        model.b_dec.zero_()
    return model.eval()


def hierarchical(reads, writes, spaces, children) -> HierarchicalSAE:
    """An H-SAE with these rows of E and D, subspaces [P, s, d], and coordinates of the children's atoms [P, C, s]."""
    P, C, s = children.shape
    config = factored(
        n_parents=P, topk_parent=2, n_children_per_parent=C, topk_child_total=2, subspace_dim=s, gate="hard"
    )
    model = HierarchicalSAE(config, D, "none")
    with torch.no_grad():
        model.E.copy_(reads)
        model.D.copy_(torch.nn.functional.normalize(writes, dim=1))
        model.Up.copy_(spaces)
        model.Down.copy_(spaces)
        model.G.copy_(torch.nn.functional.normalize(children, dim=2))
        model.F.copy_(model.G)
        for bias in (model.b_E, model.b_F, model.b_dec):
            bias.zero_()
    return model.eval()


def tree() -> HierarchicalSAE:
    """Parents write e0, e1, e2; the children of parent p write two directions of their own from e4 on."""
    spaces = torch.stack([EYE[4 + 2 * p : 6 + 2 * p] for p in range(3)])
    return hierarchical(EYE[:3], EYE[:3], spaces, torch.eye(2).expand(3, 2, 2))


def near(draws, chance) -> bool:
    """Whether the mean of the draws is within 3 standard errors of their chance levels."""
    gaps = np.asarray(draws, dtype=float) - chance
    return bool(abs(gaps.mean()) <= 3 * gaps.std(ddof=1) / math.sqrt(len(gaps)))


# intervals


def test_the_interval_of_a_median_is_that_of_many_resamples():
    values = np.random.default_rng(0).normal(size=101)
    found = bootstrap_quantile(values, 0.5)
    draws = np.random.default_rng(1).choice(values, size=(20_000, 101))
    assert found.value == np.median(values)
    assert found.ci95 == pytest.approx(np.quantile(np.median(draws, axis=1), [0.025, 0.975]), abs=0.03)
    assert bootstrap_quantile([2.0, 2.0, 2.0], 0.25).ci95 == (2.0, 2.0)
    assert bootstrap_quantile([1.0], 0.5).ci95 is None
    assert bootstrap_quantile([], 0.5).why == "no units with a value"


# purity, leakage, recall


def test_concept_metrics_of_permuted_labels_are_at_chance():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [30, 50, 80, 120])
    acts = np.maximum(rng.normal(size=(len(labels), 4)), 0).astype(np.float32)
    acts[np.arange(len(labels)), labels] += 2 * (rng.random(len(labels)) < 0.7)
    names = ("purity", "purity_auroc", "leakage", "leakage_all_rows", "recall")
    found = [
        concept_metrics(acts, rng.permutation(labels), np.arange(4), resampling=Resampling(1)).metrics
        for _ in range(80)
    ]
    for name in names:
        assert near([metrics[name].value for metrics in found], [metrics[name].chance for metrics in found]), name
    planted = concept_metrics(acts, labels, np.arange(4)).metrics
    for name in names:
        low, high = planted[name].ci95
        assert not low <= planted[name].chance <= high, name


# split


def split_codes(parts: int, rows: int = 60):
    """Eight concepts; the rows of concept 0 are dealt out among `parts` latents, the others have one latent each."""
    labels = np.repeat(np.arange(8), rows)
    dense = np.zeros((8 * rows, parts + 8))
    dense[np.arange(rows), np.arange(rows) % parts] = 1.5
    dense[np.arange(rows, 8 * rows), parts + labels[rows:] - 1] = 1.0
    dense[:, parts + 7] = 0.3  # on everywhere
    return sparse(dense), labels


@pytest.mark.parametrize("parts", [1, 2, 4, 5])
def test_split_of_a_concept_dealt_out_among_latents(parts):
    acts, labels = split_codes(parts)
    found = split_metrics(acts, labels, acts, labels, np.arange(8))
    best = 2 / (parts + 1)  # one part is precise and finds 1 row in `parts`
    assert found.units["f1_best"].numerator_U == pytest.approx([best] + [1] * 7)
    assert found.units["f1_best_few"].numerator_U == pytest.approx([1] * 8)
    assert found.units["split"].numerator_U == pytest.approx([1 - best] + [0] * 7)
    assert found.metrics["split"].value == pytest.approx((1 - best) / 8)


def test_split_takes_at_most_five_latents_and_measures_on_other_rows():
    acts, labels = split_codes(6)
    found = split_metrics(acts, labels, acts, labels, np.arange(8))
    assert found.units["f1_best_few"].numerator_U[0] == pytest.approx(2 * 50 / (60 + 50))
    silent = SparseActivations(acts.index_Nk, np.zeros_like(acts.value_Nk), acts.n_latents)
    assert split_metrics(acts, labels, silent, labels, np.arange(8)).metrics["f1_best_few"].value == 0


def test_split_thresholds_and_ties_by_hand():
    dense = [[3, 0], [2, 0], [2, 0], [1, 5], [1, 5]]
    acts, labels = sparse(dense), np.array([0, 0, 1, 1, 1])
    found = split_metrics(acts, labels, acts, labels, np.arange(2))
    # concept 0: above 3 one of two rows (2/3), above 2, a tie, two of three (4/5); concept 1: latent 1 finds two of
    # three (4/5), all rows are 3 of 5 (3/4); the second latent adds a row of its own at the cost of two others
    assert found.units["f1_best"].numerator_U == pytest.approx([4 / 5, 4 / 5])
    assert found.units["f1_best_few"].numerator_U == pytest.approx([4 / 5, 4 / 5])


def test_split_of_permuted_labels_is_at_chance():
    rng = np.random.default_rng(0)
    acts, labels = split_codes(4, rows=40)
    names = ("split", "f1_best", "f1_best_few")
    draws = []
    for seed in range(40):
        found = split_metrics(
            acts, rng.permutation(labels), acts, rng.permutation(labels), np.arange(8), Resampling(1, seed)
        ).metrics
        draws.append([(found[name].value, found[name].chance) for name in names])
    for (values, chances), name in zip(np.array(draws).transpose(1, 2, 0), names, strict=True):
        assert near(values, chances), name


# absorption: rows of concept 0 are e0, and in a share of them e0 + e3, which another latent reads and writes

CONCEPT, TOKEN = EYE[0], EYE[3]


def absorbing_rows(share: float, n: int = 100):
    """Rows of concepts 0, 1 and 2 with their labels; `share` of concept 0's carry the token that another reads."""
    labels = np.repeat([0, 1, 2], n)
    rows = EYE[torch.from_numpy(labels)].clone()
    rows[: round(share * n)] += TOKEN
    return 2 * rows, labels


def absorbed(model, share: float, latent_Q=(0, 1, 2), resamples=200):
    rows, labels = absorbing_rows(share)
    read = torch.zeros(3, D, dtype=torch.float64)
    read[range(3), range(3)] = 0.5  # concepts' rows project to 1
    codes = row_codes(model, Store(test={"acts": rows}), "test", np.arange(len(rows)))
    probes = ParentProbes(read, torch.zeros(D, dtype=torch.float64))
    return absorption_metrics(
        model, codes, rows, labels, np.array(latent_Q), probes, np.arange(3), Resampling(resamples)
    ).metrics


def absorbing_flat() -> TopKSAE:
    """Latent 0 does not fire where the token is; latent 3 reads the token and writes concept and token."""
    reads = torch.stack([CONCEPT - 2 * TOKEN, EYE[1], EYE[2], TOKEN * math.sqrt(2)])
    return flat(reads, torch.stack([CONCEPT, EYE[1], EYE[2], CONCEPT + TOKEN]))


def absorbing_parent() -> HierarchicalSAE:
    """The same with parents."""
    model = absorbing_flat()
    spaces = torch.stack([EYE[8:10]] * 4)
    return hierarchical(model.E.detach(), model.D.detach(), spaces, torch.eye(2).expand(4, 2, 2))


def absorbing_child() -> HierarchicalSAE:
    """Parent 0 hardly fires where the token is, and its child writes the concept with the token."""
    reads = torch.stack([CONCEPT - 0.9 * TOKEN, EYE[1], EYE[2]])
    spaces = torch.stack([torch.stack([CONCEPT, TOKEN]), EYE[8:10], EYE[10:12]])
    return hierarchical(reads, EYE[:3], spaces, torch.tensor([[[0.9, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]]]))


def foreign_child() -> HierarchicalSAE:
    """Parent 0 is silent where the token is, and a child of parent 3 writes the concept."""
    reads = torch.stack([CONCEPT - 2 * TOKEN, EYE[1], EYE[2], TOKEN])
    spaces = torch.stack([EYE[8:10], EYE[8:10], EYE[10:12], torch.stack([CONCEPT, EYE[12]])])
    return hierarchical(reads, EYE[:4], spaces, torch.tensor([1.0, 0.0]).expand(4, 1, 2))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("make", [absorbing_flat, absorbing_parent, absorbing_child, foreign_child])
def test_planted_absorption_is_found_at_its_rate(make, share):
    found = absorbed(make(), share)
    by_others = 0.0 if make is absorbing_child else share  # a gated child cannot, by construction
    assert found["absorb"].value == pytest.approx(by_others / 3)
    assert found["absorb_with_children"].value == pytest.approx(share / 3)
    assert found["probe_recall"].value == 1
    assert found["probe_recall"].chance == 0


def test_a_latent_that_writes_too_little_does_not_absorb():
    model = absorbing_flat()
    with torch.no_grad():
        model.D[3] = torch.nn.functional.normalize(0.2 * CONCEPT + TOKEN, dim=0)  # writes 0.28 of the concept
    assert absorbed(model, 0.5)["absorb"].value == 0
    rows, _ = absorbing_rows(0.5)
    assert row_codes(model, Store(test={"acts": rows}), "test", np.arange(50)).parents.columns(np.array([3])).min() > 0


def test_a_concept_without_a_latent_is_absorbed_by_whatever_writes_it():
    assert absorbed(absorbing_flat(), 0.5, latent_Q=(-1, 1, 2))["absorb"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("make", [absorbing_flat, absorbing_child, foreign_child])
def test_the_chance_of_absorption_is_the_mean_over_all_ways_to_deal_the_latents(make):
    model = make()
    ways = [absorbed(model, 0.35, order, resamples=1) for order in itertools.permutations(range(3))]
    for name in ("absorb", "absorb_with_children"):
        assert np.mean([found[name].value for found in ways]) == pytest.approx(ways[0][name].chance)
        assert {round(found[name].chance, 12) for found in ways} == {round(ways[0][name].chance, 12)}


def test_the_probe_is_that_of_discriminant_analysis_and_projects_a_concept_to_one():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 4 - 1  # none, and children of parents 0, 0 and 1
    means = torch.randn(4, D, generator=rng)
    noise = torch.randn(4000, D, generator=rng) * torch.linspace(0.2, 1, D)
    stats = ActivationClassStats(3, D)
    stats.update(means[labels + 1] + noise + 5, labels)
    probes = parent_probes(stats, [0, 0, 1], 3, shrinkage=0.0)
    rows = means[labels + 1] + noise + 5
    for parent, members in ((0, (labels == 0) | (labels == 1)), (1, labels == 2)):
        projected = ((rows.double() - probes.mean_d) * probes.read_Pd[parent]).sum(1)
        assert float(projected[members].mean()) == pytest.approx(1, abs=1e-6)
        assert float(projected.mean()) == pytest.approx(0, abs=1e-6)
        deviation = torch.linalg.solve(stats.within_covariance(), (rows[members].mean(0) - rows.mean(0)).double())
        cosine = torch.nn.functional.cosine_similarity(probes.read_Pd[parent], deviation, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert not probes.read_Pd[2].any()  # without rows


# edges


def test_edges_by_hand():
    """Model with 2 children per parent; concepts 0, 1, 2 have parents 5, 3 and none."""
    latent_P, parent_E = np.array([5, 3, -1]), np.array([0, 0, 1, 1, 2])
    latent_E = np.array([10, 7, 6, -1, 0])  # owners 5, 3, 3, none, 0, which is matched to no concept
    found = edge_metrics(latent_E, parent_E, latent_P, 2)
    assert found.metrics["edge_recall"].value == pytest.approx(2 / 5)
    assert found.metrics["edge_precision"].value == pytest.approx(2 / 3)
    assert found.units["edge_recall"].keys_U.tolist() == [0, 1, 2]
    assert "no children" in edge_metrics(latent_E, parent_E, latent_P, 0).metrics["edge_recall"].why


def test_the_chance_of_edges_is_the_mean_over_all_ways_to_deal_the_latents():
    latent_P, parent_E = np.array([5, 3, -1]), np.array([0, 0, 1, 1, 2])
    latent_E = np.array([10, 7, 6, -1, 0])
    matched = np.flatnonzero(latent_E >= 0)
    recall, precision = [], []
    for order in itertools.permutations(latent_E[matched]):
        dealt = latent_E.copy()
        dealt[matched] = order
        found = edge_metrics(dealt, parent_E, latent_P, 2, resampling=Resampling(1)).metrics
        recall.append(found["edge_recall"].value)
        precision.append(found["edge_precision"].value)
    found = edge_metrics(latent_E, parent_E, latent_P, 2).metrics
    assert found["edge_recall"].chance == pytest.approx(np.mean(recall))
    assert found["edge_precision"].chance == pytest.approx(np.mean(precision))


def test_children_are_matched_one_to_one_and_only_where_they_say_something():
    labels = np.repeat([0, 1, 2], 20)
    dense = np.zeros((60, 9))
    dense[:20, 4], dense[20:40, 4], dense[20:40, 8] = 2, 1, 0.5  # latent 4 is best for 0 and good for 1
    dense[:40, 2] = 1  # on for all but concept 2
    assert match_children(sparse(dense), labels, 3).tolist() == [4, 8, -1]
    assert match_children(sparse(np.zeros((60, 9))), labels, 3).tolist() == [-1, -1, -1]
    rng = np.random.default_rng(0)
    parent_E, latent_P = np.arange(30) // 3, np.arange(10)
    codes = np.zeros((600, 30))
    codes[np.arange(600), np.arange(600) % 30] = 1  # latent e fires for concept e
    values, chances = [], []
    for _ in range(40):
        latent_E = match_children(sparse(codes), rng.permutation(np.arange(600) % 30), 30)
        found = edge_metrics(latent_E, parent_E, latent_P, 3, resampling=Resampling(1)).metrics["edge_recall"]
        values.append(found.value)
        chances.append(found.chance)
    assert near(values, chances)
    planted = match_children(sparse(codes), np.arange(600) % 30, 30)
    assert edge_metrics(planted, parent_E, latent_P, 3).metrics["edge_recall"].value == 1


# who fires with whom, and how evenly


def test_rates_of_codes_that_know_nothing_of_each_other_are_at_chance():
    """Children that fire in rows drawn anew, whatever their parents do."""
    rng = np.random.default_rng(0)
    names = ("parent_given_child", "child_given_parent")
    draws = []
    for _ in range(40):
        found = Firings(4, 2)
        parents = torch.from_numpy((rng.random((800, 4)) < [0.1, 0.3, 0.5, 0.7]).astype(np.float32))
        children = torch.from_numpy((rng.random((800, 8)) < 0.25).astype(np.float32))
        slots = [torch.arange(size).expand(800, -1) for size in (4, 8)]
        found.add(Codes(slots[0], parents, slots[1], children))
        metrics = firing_metrics(found, resampling=Resampling(1))
        draws.append([(metrics[name].value, metrics[name].chance) for name in names])
    for (values, chances), name in zip(np.array(draws).transpose(1, 2, 0), names, strict=True):
        assert near(values, chances), name


def test_rates_and_their_intervals_over_groups_of_documents():
    even = Firings(4, 0, n_groups=8)
    index = torch.arange(64).unsqueeze(1) % 4
    nothing = torch.zeros(64, 0)
    even.add(Codes(index, torch.ones(64, 1), nothing.long(), nothing), torch.arange(64) // 8)
    metrics = firing_metrics(even)
    assert metrics["max_firing_rate"].value == metrics["max_firing_rate"].chance == 0.25
    assert metrics["entropy"].value == pytest.approx(math.log(4))
    assert metrics["entropy"].ci95 == pytest.approx((math.log(4), math.log(4)))
    uneven = Firings(4, 0, n_groups=8)
    index = (torch.arange(64) // 8 < 6).long().unsqueeze(1)  # parent 1 in six documents, parent 0 in two
    uneven.add(Codes(index, torch.ones(64, 1), nothing.long(), nothing), torch.arange(64) // 8)
    load = firing_metrics(uneven)["max_firing_rate"]
    assert load.value == 0.75
    assert load.ci95 == pytest.approx((0.5, 1.0), abs=0.1)


def test_use_of_latents_by_hand():
    """Parent 0 in 30 rows with both children, parent 1 in 10 with one of two, parent 2 never."""
    found = Firings(3, 2)
    index = torch.tensor([[0]] * 30 + [[1]] * 10)
    child = torch.tensor([[0]] * 15 + [[1]] * 15 + [[2]] * 10)
    found.add(Codes(index, torch.ones(40, 1), child, torch.ones(40, 1)))
    metrics = usage_metrics(found)
    assert metrics["dead_parents"].value == pytest.approx(1 / 3)
    assert metrics["dead_children"].value == pytest.approx(1 / 4)
    assert metrics["dead_children_routed"].value == pytest.approx((30 * 0 + 10 * 0.5) / 40)
    assert metrics["atoms_in_use"].value == pytest.approx(1.5)
    norms = norm_metrics(tree())
    assert (norms["decoder_norm"].value, norms["atom_norm"].value) == pytest.approx((1, 1))
    assert "no children" in norm_metrics(absorbing_flat())["atom_norm"].why


def test_probes_of_latents_dealt_out_at_random_are_at_chance():
    rng = np.random.default_rng(0)
    model, atoms = tree(), torch.cat([EYE[4:10]])
    labels = torch.arange(60) % 6
    rows = EYE[labels // 2] + atoms[labels]
    probe = torch.nn.functional.normalize(EYE[torch.arange(6) // 2] + 2 * atoms + 0.1, dim=1).double()
    store, root = Store(train={"acts": rows}), torch.eye(D, dtype=torch.float64)
    codes = row_codes(model, store, "train", np.arange(60)).children
    planted = probe_metrics(model, codes, Probes(probe, root, torch.arange(60), labels))
    values, chances = [], []
    for seed in range(60):
        dealt = torch.from_numpy(rng.permutation(6))[labels]
        found = probe_metrics(model, codes, Probes(probe, root, torch.arange(60), dealt), seed)["probe_child"]
        values.append(found.value)
        chances.append(found.chance)
    assert near(values, chances)
    assert planted["probe_child"].ci95[0] > max(chances)


# reconstruction


class Predicts:
    """A model of one latent that is always on and rebuilds rows by a function."""

    n_parents, n_children = 1, 0

    def __init__(self, rebuild):
        self.rebuild = rebuild

    def encode(self, rows):
        self.rows = rows
        nothing = rows.new_zeros(len(rows), 0)
        return Codes(torch.zeros(len(rows), 1, dtype=torch.int64), torch.ones(len(rows), 1), nothing.long(), nothing)

    def decode(self, codes):
        return self.rebuild(self.rows)

    def write_directions(self):
        return EYE[:1]


def reconstruction(rebuild, **options):
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(640, D, generator=generator) * torch.linspace(1, 3, D)
    store = Store(test={"acts": acts, "doc": torch.arange(640) // 8})
    return evaluate_reconstruction(Predicts(rebuild), store, "test", torch.zeros(D), **options), acts


def test_ev_in_every_metric():
    weights = torch.linspace(0.5, 4, D).double()
    rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double())
    sigma = rotation @ torch.diag(weights) @ rotation.T

    def half(rows):
        return torch.cat([rows[:, : D // 2], torch.zeros_like(rows[:, D // 2 :])], dim=1)

    found, acts = reconstruction(half, sigma_dd=sigma)
    error = (acts - half(acts)).double()
    expected = 1 - float((error @ sigma * error).sum() / (acts.double() @ sigma * acts.double()).sum())
    assert found.metrics["ev_causal"].value == pytest.approx(expected, abs=1e-5)
    assert found.metrics["ev_dimension"].value == pytest.approx(0.5)  # half of the coordinates whole, half not at all
    assert found.metrics["ev_dimension_q05"].value == pytest.approx(0)
    assert found.metrics["ev"].value == pytest.approx(float(1 - error.square().sum() / acts.double().square().sum()))
    assert "ev_causal" not in reconstruction(half)[0].metrics
    names = ("ev", "ev_causal", "ev_dimension", "ev_dimension_q05")
    perfect, _ = reconstruction(lambda rows: rows, sigma_dd=sigma)
    assert [perfect.metrics[name].value for name in names] == pytest.approx([1, 1, 1, 1])
    constant, _ = reconstruction(torch.zeros_like, sigma_dd=sigma)  # the train mean: nothing is known of a row
    assert [constant.metrics[name].value for name in names] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert {constant.metrics[name].chance for name in names} == {0.0}


def test_a_coordinate_that_does_not_vary_has_no_ev():
    acts = torch.zeros(16, D)
    acts[:, 0] = torch.arange(16.0) - 7.5
    store = Store(test={"acts": acts, "doc": torch.arange(16)})
    found = evaluate_reconstruction(Predicts(lambda rows: rows), store, "test", torch.zeros(D)).metrics
    assert found["ev_dimension"].value == 1
    store = Store(test={"acts": 0 * acts, "doc": torch.arange(16)})
    found = evaluate_reconstruction(Predicts(lambda rows: rows), store, "test", torch.zeros(D)).metrics
    assert found["ev_dimension"].why == "no coordinate varies"


# all of it, from rows and tokens through a model


def planted_store(seed: int = 0) -> Store:
    """Rows of the concepts of `tiny.concepts`: the parent's direction, the child's, and a little noise."""
    rng = np.random.default_rng(seed)
    concepts = tiny.concepts()

    def split(fold: str):
        child_of = concepts.token_to_child(vocab_size=tiny.VOCAB, folds=(fold,)).long()
        token = torch.from_numpy(rng.integers(1, tiny.VOCAB, 2000))
        child = child_of[token]
        rows = 0.05 * torch.from_numpy(rng.normal(size=(2000, D))).float()
        labelled = child >= 0
        rows[labelled] += 2 * EYE[child[labelled] // 2] + 1.5 * EYE[4 + child[labelled]]
        rows[~labelled] += 2 * EYE[15]
        return {"acts": rows, "token": token.int(), "doc": torch.arange(2000) // 10}

    return Store(train=split("train"), test=split("test"))


@pytest.mark.parametrize("kind", ["hierarchical", "flat"])
def test_a_model_that_is_the_planted_tree_has_all_the_known_answers(kind):
    store, concepts = planted_store(), tiny.concepts()
    model = tree() if kind == "hierarchical" else flat(EYE[:10], EYE[:10])
    data = ConceptData(store, concepts, "current_token", tiny.VOCAB)
    mapped = evaluate_concepts(model, data)
    found = evaluate_structure(model, data, labelled_sample(data), mapped).metrics
    assert len(mapped.parents_Q) == 3
    assert (found["f1_best"].value, found["split"].value) == pytest.approx((1, 0))
    assert (found["absorb"].value, found["absorb_with_children"].value) == (0, 0)
    assert found["probe_recall"].value == 1
    assert found["absorb"].n == found["split"].n == 3
    few = evaluate_structure(model, data, labelled_sample(data), replace(mapped, parents_Q=np.arange(1), lacking="few"))
    assert few.metrics["split"].why == few.metrics["absorb"].why == "2 concepts are needed, 1 has enough rows: few"
    if kind == "flat":
        assert "no children" in found["edge_recall"].why
        return
    assert (found["edge_recall"].value, found["edge_precision"].value) == (1, 1)
    assert found["edge_recall"].chance == pytest.approx(1 / 3)
    assert found["probe_min"].value > 0.3
