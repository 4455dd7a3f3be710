"""Steering through an autoencoder: both forms, parents and children, doses and layers."""

import copy
import json

import numpy as np
import pytest
import tiny
import torch
from fakes import Store
from models import factored

from polytope_hsae.config import TopKConfig
from polytope_hsae.evaluation.bootstrap import Resampling
from polytope_hsae.evaluation.concepts import ConceptData, LabelledChildren
from polytope_hsae.evaluation.edges import map_children
from polytope_hsae.evaluation.pushing import Search
from polytope_hsae.evaluation.steering import STEERING_METRICS, Steered, directions, evaluate_steering, overrides
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE

P, C, D_MODEL = 4, 3, tiny.WIDTH


def hierarchical(normalize: str = "rms") -> HierarchicalSAE:
    torch.manual_seed(0)
    config = factored(n_parents=P, topk_parent=2, n_children_per_parent=C, topk_child_total=2, subspace_dim=3)
    model = HierarchicalSAE(config, D_MODEL, normalize)
    model.set_normalization(torch.randn(D_MODEL) * 0.3, 2.5)
    model.normalize_decoder_weights()
    return model.eval()


def flat() -> TopKSAE:
    torch.manual_seed(0)
    model = TopKSAE(TopKConfig(n_latents=12, k=3), D_MODEL)
    model.set_normalization(torch.randn(D_MODEL) * 0.3, 2.5)
    model.normalize_decoder_weights()
    return model.eval()


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny.language_model("llama")


IDS = torch.randint(1, tiny.VOCAB, (6, 5), generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalize", ["rms", "unit_row", "none"])
@pytest.mark.parametrize("level", ["parent", "child"])
@torch.no_grad()
def test_an_override_sets_the_code_and_leaves_the_error_in_place(level: str, normalize: str) -> None:
    model, h_Md = hierarchical(normalize), ROWS
    codes = model.encode(h_Md)
    index, value = (codes.child_index, codes.child_value) if level == "child" else codes[:2]
    latent = int(index[0, 0])
    assert float(value[0, 0]) > 0
    assert not (index == latent).all()  # it is off in some contexts
    moves = overrides(model, level, np.array([latent]), h_Md)
    alpha = 3.0
    moved_Md = alpha * moves.direction_GMd[0] + moves.offset_GMd[0]
    # the code that every context has afterwards, by setting it in the codes themselves
    scale = model.data_scale if codes.row_scale is None else codes.row_scale.median()
    wanted = alpha / float(scale)
    edited_index = torch.cat([index, torch.full((len(h_Md), 1), latent)], 1)
    edited_value = torch.cat([torch.where(index == latent, 0.0, value), torch.full((len(h_Md), 1), wanted)], 1)
    names = ("child_index", "child_value") if level == "child" else ("parent_index", "parent_value")
    edited = codes._replace(**dict(zip(names, (edited_index, edited_value), strict=True)))
    expected_Md = model.decode(edited) - model.decode(codes)
    torch.testing.assert_close(moved_Md, expected_Md, rtol=1e-4, atol=1e-5)
    # where the code is off and rows share a scale, that is the injection
    if normalize != "unit_row":
        off = ~((index == latent) & (value > 0)).any(1)
        row_d = directions(model, level, np.array([latent]))[0]
        torch.testing.assert_close(moved_Md[off], (alpha * row_d).expand(int(off.sum()), -1), rtol=1e-4, atol=1e-5)
        on = expected_Md[0] @ row_d
        assert float(on) == pytest.approx(alpha - float(value[0, 0]) * float(scale), rel=1e-4)


def test_a_childs_direction_is_its_atom() -> None:
    model = hierarchical()
    rows = directions(model, "child", np.array([0, 7]))
    atoms = model.atoms(slice(None)).reshape(P * C, D_MODEL)[[0, 7]]
    torch.testing.assert_close(rows, torch.nn.functional.normalize(atoms, dim=1))
    torch.testing.assert_close(directions(flat(), "child", np.array([5])), flat().write_directions()[5:6])


CHILDREN = {"hsae": [0, 4], "flat": [3, 4]}  # latents of the child concepts 0 and 3


@torch.no_grad()
def aimed(kind: str, lm: LanguageModel) -> SparseAutoencoder:
    """A model whose latents 0 to 2 write towards the parents' words, and CHILDREN towards two children's."""
    model = hierarchical() if kind == "hsae" else flat()
    tokens = tiny.concepts(3, 2).child_tokens()
    towards = torch.stack([torch.nn.functional.normalize(lm.unembedding[ids].sum(0), dim=0) for ids in tokens])
    for parent in range(3):
        model.D[parent] = torch.nn.functional.normalize(towards[2 * parent] + towards[2 * parent + 1], dim=0)
    for child, latent in zip((0, 3), CHILDREN[kind], strict=True):
        if isinstance(model, HierarchicalSAE):
            model.G[latent // C] = torch.eye(C)
            model.Up[latent // C, latent % C] = towards[child]
        else:
            model.D[latent] = towards[child]
    return model


@pytest.mark.parametrize("kind", ["hsae", "flat"])
def test_both_forms_of_both_levels_reach_the_effect_at_every_dose_and_layer(kind, lm) -> None:
    model, concepts = aimed(kind, lm), tiny.concepts(3, 2)
    options = {"doses": [0.2], "layers": ["model.norm"], "resampling": Resampling(50)}
    children = Steered([0, 3, 5], np.array([*CHILDREN[kind], -1]))
    found = evaluate_steering(
        model, lm, FINAL_HOOK, concepts, Steered([0, 1, 2], np.arange(3)), IDS, children=children,
        search=Search(0.4, max_norms=60.0, max_evaluations=60), **options,
    )  # fmt: skip
    assert tuple(found.result.metrics) == STEERING_METRICS
    assert json.dumps([found.records, found.children, found.grid], allow_nan=False)
    places = [(cell["level"], cell["form"], cell["hook"], cell["target_nats"]) for cell in found.grid]
    hooks = [("inject", FINAL_HOOK), ("override", FINAL_HOOK), ("inject", "model.norm")]
    assert places == [(level, *hook, nats) for level in ("parent", "child") for hook in hooks for nats in (0.4, 0.2)]
    reached = [cell for cell in found.grid if cell["unreached"] < cell["concepts"]]
    assert len(reached) == len(found.grid)
    for cell in reached:
        assert cell["mean_effect"] == pytest.approx(cell["target_nats"], abs=0.005)
        assert cell["steering_leakage"]["n"] == cell["concepts"] - cell["unreached"]
    at = {place: cell for place, cell in zip(places, found.grid, strict=True)}
    main, less, there = (at["parent", "inject", hook, nats] for hook, nats in
                         ((FINAL_HOOK, 0.4), (FINAL_HOOK, 0.2), ("model.norm", 0.4)))  # fmt: skip
    assert main["steering_leakage"]["value"] == found.result.metrics["steering_leakage"].value
    assert main["steering_leakage"]["chance"] == found.result.metrics["steering_leakage"].chance
    assert less["unreached"] <= main["unreached"]
    assert less["steering_leakage"]["value"] < main["steering_leakage"]["value"]
    assert there["unreached"] == main["unreached"]  # the norm's output is the final residual
    assert there["steering_leakage"]["value"] == pytest.approx(main["steering_leakage"]["value"], rel=1e-3)
    assert [record["child"] for record in found.children] == [0, 3, 5]
    assert [record["alpha"] is None for record in found.children][-1]  # it has no latent
    assert found.result.metrics["child_steering_unreached"].value >= 1 / 3
    assert list(found.result.units["child_steering_leakage"].keys_U) == [0, 3, 5]


@pytest.mark.parametrize("hook", [FINAL_HOOK, "model.layers.0"])
def test_a_bfloat16_models_concepts_are_within_the_tolerance_or_unreached(hook) -> None:
    """The numbers are those of the same weights in float32, for two autoencoders whose doses are to match."""
    rounded = tiny.model("llama").to(torch.bfloat16)
    low = LanguageModel(rounded, tiny.tokenizer(), name="low", has_head=True)
    high = LanguageModel(copy.deepcopy(rounded).float(), tiny.tokenizer(), name="high", has_head=True)
    common = {"search": Search(0.5, max_norms=60.0), "resampling": Resampling(50)}
    for kind in ("hsae", "flat"):
        model, concepts = aimed(kind, high), tiny.concepts(3, 2)
        children = Steered([0, 3], np.array(CHILDREN[kind]))
        options = {"children": children, **common}
        found, same = (
            evaluate_steering(model, lm, hook, concepts, Steered([0, 1, 2], np.arange(3)), IDS, **options)
            for lm in (low, high)
        )
        assert (found.records, found.children, found.grid) == (same.records, same.children, same.grid)
        effects = [record[f"{of}effect"] for record in found.records + found.children for of in ("", "chance_")]
        reached = [effect for effect in effects if effect is not None]
        assert len(reached) >= 5
        assert reached == pytest.approx([0.5] * len(reached), abs=0.005)
        assert found.result.metrics["steering_unreached"].value == np.mean(
            [one["effect"] is None for one in found.records]
        )
    assert next(rounded.parameters()).dtype == torch.bfloat16


# the map of child concepts


def test_children_are_mapped_to_the_latents_that_tell_them_from_their_siblings() -> None:
    """Rows along an atom's reader, on top of the parent's, have that child on; the map finds the planted order."""
    model, concepts = hierarchical("none"), tiny.concepts(2, 3)
    latent_P, order = np.array([3, 1]), {0: [2, 0, 1], 1: [1, 2, 0]}
    axes, rows, labels = torch.eye(D_MODEL), [], []
    with torch.no_grad():  # every parent and every child reads an axis of its own
        model.E.copy_(axes[:P])
        model.D.copy_(axes[:P])
        model.Down.copy_(axes[P:].view(P, C, D_MODEL))
        model.F.copy_(torch.eye(C).expand(P, C, C))
    for parent, latent in enumerate(latent_P.tolist()):
        for child in range(3):
            row = 5 * axes[latent] + 2 * axes[P + C * latent + order[parent][child]]
            rows += [row + 0.05 * torch.randn(20, D_MODEL)]
            labels += [3 * parent + child] * 20
    acts = torch.cat(rows)
    data = ConceptData(Store(train={"acts": acts}), concepts, "current_token", tiny.VOCAB)
    train = LabelledChildren(np.arange(len(acts)), np.array(labels))
    found = map_children(model, data, train, [0, 1, 2, 4], latent_P)
    on = [latent_P[child // 3] * C + order[child // 3][child % 3] for child in (0, 1, 2, 4)]
    assert found.tolist() == on
    without = map_children(model, data, train, [0, 4], np.array([3, -1]))
    assert without.tolist() == [on[0], -1]
    flat_found = map_children(flat(), data, train, [0, 1, 4], latent_P)
    assert len(set(flat_found.tolist())) == 3
    assert (flat_found >= 0).all()
