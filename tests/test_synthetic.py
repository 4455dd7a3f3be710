"""Worlds of known features: what is drawn, what is counted, known answers of every metric."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polytope_hsae.config import TopKConfig
from polytope_hsae.evaluation.synthetic.edges import (
    best_cofiring,
    cofiring,
    edge_scores,
    forest,
    reachable,
    structure,
    two_level_bound,
)
from polytope_hsae.evaluation.synthetic.recovery import Counts, count, decoders, detection, match, recovery, slots
from polytope_hsae.evaluation.synthetic.rows import Rows, SyntheticStream, draw
from polytope_hsae.evaluation.synthetic.world import World, WorldConfig
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.flat import TopKSAE

SMALL: dict[str, Any] = {
    "n_features": 60,
    "width": 64,
    "trees": 4,
    "branching": 3,
    "depth": 2,
    "rate_max": 0.4,
    "rate_min": 0.02,
    "orthogonal_steps": 300,
}


def world(**changes: Any) -> World:
    return World(WorldConfig.model_validate({**SMALL, **changes}))


def active(rows: Rows, n_features: int) -> Tensor:
    """Which features are on in each row, [B, N] bool."""
    on_BN = torch.zeros(len(rows.x), n_features, dtype=torch.bool)
    on_BN[rows.row, rows.feature] = True
    return on_BN


def perfect(made: World, rows: Rows) -> tuple[Tensor, Tensor]:
    """Slots of a model whose latent i is on exactly where feature i is."""
    on_BN = active(rows, made.config.n_features)
    latent_BK = torch.arange(on_BN.shape[1]).expand(on_BN.shape)
    return latent_BK, on_BN


def counted(made: World, n_rows: int = 20_000) -> Counts:
    """Counts of the perfect model."""
    rows = draw(made, n_rows, "test", 0)
    counts = Counts(made.config.n_features, made.config.n_features, made.device)
    counts.add(*perfect(made, rows), rows)
    return counts


def test_trees_are_numbered_breadth_first():
    made = world()
    assert made.config.level_sizes == [4, 12, 36]
    assert made.parent_N[:4].tolist() == [-1] * 4
    assert made.parent_N[4:16].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert made.parent_N[16:19].tolist() == [4, 4, 4]
    assert made.parent_N[52:].tolist() == [-1] * 8
    assert (made.level_N[52:] == -1).all()
    assert made.nominal_N[0] == pytest.approx(0.4)
    assert made.nominal_N[-1] == pytest.approx(0.02)
    assert made.nominal_N[9] / made.nominal_N[0] == pytest.approx(
        (0.02 + 0.38 * (10**-0.5 - 60**-0.5) / (1 - 60**-0.5)) / 0.4
    )


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("rank", [0, 6])
def test_features_fire_as_often_as_said_and_children_only_under_their_parent(exclusive, rank):
    made = world(exclusive=exclusive, correlation_rank=rank, correlation_scale=0.3)
    rows = draw(made, 40_000, "test", 0)
    on_BN = active(rows, 60)
    rate_N = on_BN.double().mean(0)
    assert ((rate_N - made.rate_N).abs() < 5 * (made.rate_N / 40_000).sqrt()).all()
    has_N = made.parent_N >= 0
    assert not (on_BN[:, has_N] & ~on_BN[:, made.parent_N[has_N]]).any()
    siblings_B = on_BN[:, 4:7].sum(1)
    assert int(siblings_B.max()) == (1 if exclusive else 3)


def test_the_copula_correlates_features_without_a_parent():
    made = world(correlation_rank=2, correlation_scale=0.5)
    pairs = torch.triu_indices(4, 4, 1)
    roots = torch.corrcoef(active(draw(made, 40_000, "test", 0), 60)[:, :4].double().T)[*pairs]
    latent = (made.loading_nr @ made.loading_nr.T)[*pairs]
    assert torch.corrcoef(torch.stack([roots, latent.double()]))[0, 1] > 0.95
    assert roots.abs().max() > 0.05
    alone = active(draw(world(), 40_000, "test", 0), 60)[:, made.free_n].double()
    assert (torch.corrcoef(alone.T) - torch.eye(len(made.free_n))).abs().max() < 0.03


def test_rows_are_sums_of_directions_times_magnitudes():
    made = world(bias_norm=2.0, noise=0.0)
    rows = draw(made, 500, "train", 3)
    dense_BN = torch.zeros(500, 60)
    dense_BN[rows.row, rows.feature] = rows.value
    assert torch.allclose(rows.x, dense_BN @ made.direction_Nd + made.bias_d, atol=1e-4)
    assert made.bias_d.norm() == pytest.approx(2.0)
    assert (rows.row.diff() >= 0).all()
    noisy = draw(world(bias_norm=2.0, noise=0.5), 500, "train", 3)
    assert (noisy.x - rows.x).std() == pytest.approx(0.5, rel=0.05)


def test_magnitudes_are_constant_without_spread_and_follow_the_parent():
    plain = draw(world(spread_mean=0, spread_sd=0), 200, "train", 0)
    made = world()
    assert torch.allclose(plain.value, made.mean_N[plain.feature])
    scaled = world(spread_mean=1.0, spread_sd=0.0)
    rows = draw(scaled, 20_000, "train", 0)
    dense_BN = torch.zeros(20_000, 60)
    dense_BN[rows.row, rows.feature] = rows.value
    both_B = (dense_BN[:, 0] > 0) & (dense_BN[:, 4] > 0)
    with_parent = torch.corrcoef(dense_BN[both_B][:, [0, 4]].T)[0, 1]
    assert with_parent > 0.5
    assert (rows.value > 0).all()


def test_directions_are_unit_apart_and_have_the_mean_cosine_asked_for():
    made = world()  # 60 directions in 64 dimensions can be orthogonal
    gram = made.direction_Nd @ made.direction_Nd.T
    assert torch.allclose(gram.diagonal(), torch.ones(60), atol=1e-5)
    assert (gram - torch.eye(60)).abs().max() < 0.02
    shared = world(mean_cosine=0.3).direction_Nd
    off = (shared @ shared.T)[~torch.eye(60, dtype=torch.bool)]
    assert off.mean() == pytest.approx(0.3, abs=0.02)


def test_one_seed_gives_one_stream_and_a_place_in_it_can_be_gone_back_to():
    made = world()
    one, other = SyntheticStream(made, 32), SyntheticStream(world(), 32)
    batches = [one.next() for _ in range(20)]
    assert all(torch.equal(batch, other.next()) for batch in batches)
    again = SyntheticStream(made, 32)
    again.load_state_dict({**one.state_dict(), "rows_consumed": 11 * 32})
    assert torch.equal(again.next(), batches[11])
    assert not torch.equal(batches[0], SyntheticStream(world(seed=1), 32).next())
    assert not torch.equal(draw(made, 32, "train", 0).x, draw(made, 32, "test", 0).x)
    with pytest.raises(ValueError, match="batch_size"):
        SyntheticStream(made, 64).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"n_features": 51}, "trees"), ({"rate_min": 0.5}, "rate_min"), ({"leaves": 3}, "leaves")],
)
def test_impossible_worlds_are_refused(changes, field):
    with pytest.raises(ValueError, match=field):
        world(**changes)


def test_counts_are_those_of_dense_codes():
    made = world()
    rows = draw(made, 300, "test", 0)
    generator = torch.Generator().manual_seed(0)
    on_BL = torch.rand(300, 21, generator=generator) < 0.2
    parents, children = on_BL[:, :7].float(), on_BL[:, 7:].float()
    everyone = torch.arange(14).expand(300, -1)
    codes = Codes(torch.arange(7).expand(300, -1), parents, everyone, children)
    counts = Counts(21, 60, made.device)
    latent_BK, on_BK = slots(codes, 7)
    assert latent_BK.shape[1] == on_BL.sum(1).max()
    counts.add(latent_BK, on_BK, rows)
    dense_BN, dense_BL = active(rows, 60).double(), on_BL.double()
    assert torch.equal(counts.both_LN.double(), dense_BL.T @ dense_BN)
    assert torch.equal(counts.pair_LL.double(), dense_BL.T @ dense_BL)
    assert torch.equal(counts.latent_L.double(), dense_BL.sum(0))
    assert torch.equal(counts.feature_N.double(), dense_BN.sum(0))


def test_the_perfect_model_gets_everything():
    made = world()
    counts = counted(made)
    found = match(made.direction_Nd, made)
    assert torch.equal(found.feature_L, torch.arange(60))
    detected = detection(counts, found)
    assert detected == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "f1_assigned": pytest.approx(1.0)}
    recovered = recovery(counts, found, made)
    assert recovered["mcc"] == pytest.approx(1.0, abs=1e-5)
    assert {recovered[f"recovered_level_{level}"] for level in range(3)} == {1.0}
    assert (recovered["unique"], recovered["leaf_given_parent"], recovered["dead"]) == (1.0, 1.0, 0.0)
    scores = edge_scores(cofiring(counts), found, made)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (1.0, 1.0, 1.0)
    assert scores["right"] == reachable(made, 60) == 48
    assert best_cofiring(counts, found, made)["f1"] == 1.0
    assert scores["chance"] is not None
    assert scores["chance"] < 0.2


def test_permuted_latents_recover_as_much_and_flipped_ones_nothing():
    made = world()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    found = match(made.direction_Nd[order], made)
    assert torch.equal(found.feature_L, order)
    flipped = match(-made.direction_Nd, made)
    assert (flipped.feature_L == -1).all()  # a latent that writes the opposite does not stand for a feature
    assert flipped.cosine_M.abs().mean() == pytest.approx(1.0, abs=1e-5)


def test_random_decoders_are_at_chance():
    made = world(n_features=400, trees=4)
    random_Ld = torch.nn.functional.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(2)), dim=1)
    found = match(random_Ld, made)
    assert (found.feature_L == -1).all()
    # The largest of 400 cosines in 64 dimensions is about sqrt(2 ln 400 / 64).
    assert found.cosine_M.abs().mean() == pytest.approx(math.sqrt(2 * math.log(400) / 64), rel=0.2)


def test_a_two_level_model_holds_every_second_level_and_the_rule_adds_the_rest():
    made = world()
    counts = counted(made)
    found = match(made.direction_Nd, made)
    # Four router parents with three children each stand for roots and level 1, twelve more for level 1 and its leaves.
    holds = torch.tensor([0, 1, 2, 3, *range(4, 16)])
    upper = torch.full((60,), -1)
    for parent in holds.tolist():
        children = (made.parent_N == parent).nonzero().squeeze(1)
        upper[children] = parent
    below_L = torch.where(torch.isin(torch.arange(60), holds), -1, upper)  # level 1 are parents: roots keep no child
    scores = edge_scores(below_L, found, made)
    assert (scores["precision"], scores["right"]) == (1.0, 36)
    assert scores["recall"] == pytest.approx(36 / 48)
    rule_L = cofiring(counts, 16)
    whole = edge_scores(torch.where(below_L >= 0, below_L, rule_L), found, made)
    assert whole["f1"] == 1.0
    assert two_level_bound(made, n_parents=12, n_children=3) == 36
    assert two_level_bound(made, n_parents=4, n_children=2) == 8
    skipped = torch.full((60,), -1)
    skipped[16:52] = made.parent_N[made.parent_N[16:52]]
    assert edge_scores(skipped, found, made)["ancestors"] == 1.0
    assert edge_scores(skipped, found, made)["precision"] == 0.0


def test_structure_has_an_edge_for_every_child_that_is_on():
    latent_L = torch.tensor([5, 5, 1, 1, 0, 1])
    assert structure(2, 2, latent_L).tolist() == [-1, -1, 0, 0, -1, 1]
    assert structure(3, 0, torch.ones(3)).tolist() == [-1, -1, -1]


def test_latents_that_are_nearly_always_on_are_nobodys_parent():
    counts = Counts(3, 3, torch.device("cpu"))
    counts.rows = 1000
    counts.latent_L = torch.tensor([900, 300, 100])
    counts.pair_LL = torch.tensor([[900, 290, 98], [290, 300, 95], [98, 95, 100]], dtype=torch.int32)
    assert cofiring(counts).tolist() == [-1, -1, 1]
    counts.pair_LL[1, 2] = counts.pair_LL[2, 1] = 80
    assert cofiring(counts).tolist() == [-1, -1, -1]
    assert cofiring(counts, covered=0.8).tolist() == [-1, -1, 1]
    assert forest(3, 0, counts).tolist() == [-1, -1, -1]


def test_a_flat_model_that_is_the_world_is_measured_so():
    made = world(noise=0.0, spread_mean=0.0, spread_sd=0.0, bias_norm=0.0)
    model = TopKSAE(TopKConfig(n_latents=60, k=12), 64, "none")
    with torch.no_grad():
        model.D.copy_(made.direction_Nd)
        model.E.copy_(made.direction_Nd)
        model.b_E.fill_(-1.0)
    model.eval()
    counts = count(model, made, 8192, torch.zeros(64))
    found = match(decoders(model), made)
    assert counts.rows == 8192
    assert detection(counts, found)["f1"] > 0.99
    assert counts.parent_codes / counts.rows == pytest.approx(float(made.rate_N.sum()), rel=0.05)
    assert counts.ev > 0.9
