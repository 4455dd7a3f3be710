"""Pushing the language model: exactness against plain passes and autograd, and known answers in a linear world."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from fakes import Store

from polytope_hsae.evaluation.agreement import teacher_agreement
from polytope_hsae.evaluation.concepts import ConceptData
from polytope_hsae.evaluation.interventions import COLUMNS, evaluate_interventions
from polytope_hsae.evaluation.pushing import (
    Contexts,
    Search,
    child_targets,
    parent_targets,
)
from polytope_hsae.geometry.causal import CausalGeometry, Space
from polytope_hsae.lm import FINAL_HOOK
from polytope_hsae.teacher import Teacher, extract_teacher

HOOKS = {"llama": "model.layers.0", "neox": "gpt_neox.layers.0", "gemma2": "model.layers.0"}


def ids(count: int = 4, length: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.cat(
        [torch.zeros(count, 1), torch.randint(1, tiny.VOCAB, (count, length - 1), generator=generator)], 1
    ).long()


def direction(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(tiny.WIDTH, generator=generator), dim=0)


def plain_log_p(kind: str, hook: str, added_Md: torch.Tensor) -> torch.Tensor:
    """log p [M, V] after a whole pass of the bare model with `added` at the hook's last position, with its gradient."""
    model = tiny.model(kind)

    def on_output(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] + added_Md[:, None].to(hidden)], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def on_head(module, args):
        return (torch.cat([args[0][:, :-1], args[0][:, -1:] + added_Md[:, None].to(args[0])], dim=1),)

    if hook == FINAL_HOOK:
        handle = model.get_output_embeddings().register_forward_pre_hook(on_head)
    else:
        handle = model.get_submodule(hook).register_forward_hook(on_output)
    try:
        return model(input_ids=ids()).logits[:, -1].double().log_softmax(-1)
    finally:
        handle.remove()


@pytest.mark.parametrize("place", ["final", "inner"])
@pytest.mark.parametrize("kind", ["llama", "neox", "gemma2"])
def test_a_push_equals_a_whole_pass_through_norm_and_softcap(kind: str, place: str) -> None:
    """Every number, from log-probabilities that a bare model gives when the same is added to it."""
    hook = FINAL_HOOK if place == "final" else HOOKS[kind]
    concepts = tiny.concepts(3, 2)
    contexts = Contexts(tiny.language_model(kind), hook, ids())
    parent, child = (
        parent_targets(concepts, [1], torch.device("cpu")),
        child_targets(concepts, [2], torch.device("cpu")),
    )
    assert parent[0].tokens.tolist() == [7, 8, 9, 10, 11, 12]
    assert [part.tolist() for part in child[0].parts] == [[10, 11, 12]]
    alpha = 0.7 * contexts.typical_norm
    added_Md = (alpha * direction()).expand(len(ids()), -1)
    with torch.no_grad():
        before, after = (plain_log_p(kind, hook, scale * added_Md).exp() for scale in (0, 1))
    found = contexts.log_probabilities(added_Md[None])[0]
    torch.testing.assert_close(found.exp(), after, rtol=1e-3, atol=1e-5)

    inside, siblings, own = [7, 8, 9, 10, 11, 12], [10, 11, 12], [7, 8, 9]
    rest = [token for token in range(tiny.VOCAB) if token not in inside]
    odds = [(p[:, inside].sum(1) / p[:, rest].sum(1)).log() for p in (before, after)]
    torch.testing.assert_close(contexts.odds_rise(found, parent[0].tokens), odds[1] - odds[0], rtol=1e-3, atol=1e-4)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        return (p * (p / q).log()).sum(1)

    side = kl(before[:, rest], after[:, rest])
    torch.testing.assert_close(contexts.side_effect(found, parent[0].tokens), side, rtol=1e-3, atol=1e-5)
    assert float(side.mean()) > 1e-3
    assert contexts.tokens_kl(found, parent[0].parts) == pytest.approx(
        float(kl(before[:, inside], after[:, inside]).mean()), rel=1e-3, abs=1e-5
    )
    masses = [torch.stack([p[:, own].sum(1), p[:, siblings].sum(1)], 1) for p in (before, after)]
    assert contexts.parts_kl(found, parent[0].parts) == pytest.approx(float(kl(*masses).mean()), rel=1e-3, abs=1e-5)
    shares = [(p[:, siblings].sum(1) / p[:, rest].sum(1)).log() for p in (before, after)]
    moved = contexts.share_rise(found, child[0].others[0], child[0].whole)
    torch.testing.assert_close(moved, shares[1] - shares[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "neox", "gemma2"])
def test_a_small_push_has_the_slope_that_autograd_gives(kind: str) -> None:
    contexts = Contexts(tiny.language_model(kind), HOOKS[kind], ids())
    target = parent_targets(tiny.concepts(3, 2), [0], torch.device("cpu"))[0]
    alpha = torch.zeros((), requires_grad=True)
    log_p = plain_log_p(kind, HOOKS[kind], (alpha * direction()).expand(len(ids()), -1))
    log_in = log_p[:, target.tokens].logsumexp(1)
    (log_in - torch.log1p(-log_in.exp())).mean().backward()
    step = 1e-2
    ends = [contexts.log_probabilities((sign * step * direction()).expand(1, len(ids()), -1))[0] for sign in (1, -1)]
    rises = [float(contexts.odds_rise(end, target.tokens).mean()) for end in ends]
    assert (rises[0] - rises[1]) / (2 * step) == pytest.approx(float(alpha.grad), rel=2e-3)


# known answers: a linear unembedding


class LinearWorld:
    """A final residual that U alone reads: parents along axes of their own, children along further ones.

    A word of child c of parent p is 2 (u_p + v_pc) and, if asked for, noise.
    """

    has_head, device, in_float32 = True, torch.device("cpu"), staticmethod(contextlib.nullcontext)

    def __init__(self, parents: int = 4, children: int = 5, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.concepts = tiny.concepts(parents, children)
        self.vocab_size = 3 * parents * children + 60
        width = parents * (1 + children)
        rows = 0.05 * torch.randn(self.vocab_size, width, generator=generator, dtype=torch.float64)
        self.parent_axis, self.child_axis = torch.eye(width)[:parents].double(), torch.eye(width)[parents:].double()
        for row, tokens in enumerate(self.concepts.child_tokens()):
            rows[tokens] = 2 * self.parent_axis[row // children] + 2 * self.child_axis[row]
            rows[tokens] += noise * torch.randn(len(tokens), width, generator=generator, dtype=torch.float64)
        self.unembedding = rows
        self.acts = torch.randn(8, 3, width, generator=generator, dtype=torch.float64)

    def capture(self, ids_MT, hook):
        return type("Captured", (), {"acts": self.acts})

    def logits_from_final(self, acts):
        return acts @ self.unembedding.T

    def teacher(self) -> Teacher:
        """Of the true axes, with the Euclidean metric."""
        eye = torch.eye(self.acts.shape[-1]).double()
        names = [parent.name for parent in self.concepts.parents]
        children = [child.name for child in self.concepts.children]
        owners = self.concepts.child_parent_R
        return Teacher.build(names, children, owners, self.parent_axis, self.child_axis, (eye, eye))


def test_along_a_written_concept_each_logit_moves_by_alpha_times_its_inner_product() -> None:
    """Sigma^(-1/2) l moves logit y by alpha <l, g_y>, g_y = Sigma^(-1/2) gamma_y."""
    lm = tiny.language_model("llama")
    geometry = CausalGeometry(lm.unembedding, 0.05)
    teacher = extract_teacher(lm.unembedding, geometry, tiny.concepts(3, 2))
    contexts = Contexts(lm, FINAL_HOOK, ids())
    written_d = teacher.parent_unified[0] @ teacher.sigma_inv_sqrt
    alpha = 0.05
    added = (alpha * written_d).float().expand(1, len(ids()), -1)
    moved_MV = contexts.lm.logits_from_final(contexts.last_Md + added[0]) - lm.logits_from_final(contexts.last_Md)
    expected_V = alpha * geometry.whiten(lm.unembedding, Space.COVECTOR) @ teacher.parent_unified[0]
    torch.testing.assert_close(moved_MV.double(), expected_V.expand_as(moved_MV), rtol=1e-3, atol=1e-3)
    # and the log-odds follow from those logits alone
    tokens = torch.tensor(sorted(token for row in tiny.concepts(3, 2).child_tokens()[:2] for token in row))
    logits_MV = lm.logits_from_final(contexts.last_Md).double() + expected_V
    rest = torch.tensor([token for token in range(tiny.VOCAB) if token not in tokens.tolist()])
    odds_M = logits_MV[:, tokens].logsumexp(1) - logits_MV[:, rest].logsumexp(1)
    before_MV = contexts.before_MV
    odds_M -= before_MV[:, tokens].logsumexp(1) - before_MV[:, rest].logsumexp(1)
    found_M = contexts.odds_rise(contexts.log_probabilities(added)[0], tokens)
    torch.testing.assert_close(found_M, odds_M, rtol=1e-3, atol=1e-3)


def pushed(world: LinearWorld, teacher: Teacher, **options) -> dict:
    return evaluate_interventions(world, FINAL_HOOK, world.concepts, teacher, torch.zeros(8, 3).long(), **options)


def test_in_a_true_hierarchy_ratios_stay_and_children_are_hit() -> None:
    world = LinearWorld()
    found = pushed(world, world.teacher(), search=Search(tolerance=1e-3, max_norms=50, max_evaluations=40))
    own, others = found["ratio_invariance"]["own"], found["ratio_invariance"]
    assert own["median"]["value"] == pytest.approx(0, abs=1e-6)  # every word of a parent moves alike
    assert own["passes"]
    assert own["unreached"] == 0
    for name in ("other", "random"):  # at the same effect, they move the words apart
        assert others[name]["unreached"] == 4 or others[name]["median"]["value"] > 0.1
        assert not others[name]["passes"]
    parents, children = found["targeting"]["parents"], found["targeting"]["children"]
    for record in found["parents"]:
        assert record["own"]["effect"] == pytest.approx(3, abs=1e-3)
        assert record["own"]["target_shift"] == record["own"]["effect"]
    assert parents["own"]["median_ratio"]["value"] > 10
    assert children["own"]["median_ratio"]["value"] > 10
    assert children["own"]["share_above_threshold"]["value"] == 1
    assert len(found["children"]) == 20
    alpha = found["children"][0]["own"]["alpha"]
    assert found["children"][0]["own"]["target_shift"] == pytest.approx(2 * alpha, rel=0.05)  # the rest hardly moves
    assert json.dumps(found, allow_nan=False)


def test_a_simplex_of_k_children_has_a_targeting_ratio_of_k_minus_one() -> None:
    """l_p is the mean of K alike children, so a difference lowers every sibling by 1/(K - 1) of what it raises."""
    world = LinearWorld(parents=2, children=5)
    world.unembedding[len(world.concepts.children) * 3 + 1 :] = 0  # nothing but the concepts moves
    teacher = world.teacher()
    deltas = world.child_axis.clone()
    for row, owner in enumerate(teacher.child_parent.tolist()):
        deltas[row] -= world.child_axis[teacher.child_parent == owner].mean(0)
    exact = Teacher.build(
        teacher.parent_names, teacher.child_names, teacher.child_parent.tolist(), teacher.parent_unified, deltas,
        (teacher.sigma_sqrt, teacher.sigma_inv_sqrt),
    )  # fmt: skip
    found = pushed(world, exact, search=Search(max_norms=50, max_evaluations=40))
    own = found["targeting"]["children"]["own"]
    assert own["median_ratio"]["value"] == pytest.approx(4, rel=1e-3)
    assert own["others_mean"]["value"] == pytest.approx(-own["target_shift"]["value"] / 4, rel=1e-3)


def test_what_is_not_reached_is_counted_and_null() -> None:
    world = LinearWorld()
    found = pushed(world, world.teacher(), search=Search(max_norms=1e-3))
    own = found["ratio_invariance"]["own"]
    assert own["unreached"] == 4
    assert own["passes"] is None
    assert own["median"]["why"] == "no units with a value"
    assert found["parents"][0]["own"] == dict.fromkeys(COLUMNS)
    assert json.dumps(found, allow_nan=False)


def test_concepts_are_found_by_name_and_limits_hold() -> None:
    world, teacher = LinearWorld(), LinearWorld().teacher()
    part = teacher.matched(["p2", "p0"], [["c21", "c20"], ["c03"]])
    options = {"search": Search(max_norms=50.0, max_evaluations=40)}
    found = pushed(world, part, **options)
    assert [record["parent"] for record in found["parents"]] == [2, 0]
    assert [record["child"] for record in found["children"]] == [11, 10, 3]
    assert found["ratio_invariance"]["own"]["median"]["value"] == pytest.approx(0, abs=1e-6)
    few = pushed(world, teacher, max_concepts=2, max_children=3, **options)
    assert [record["parent"] for record in few["parents"]] == [0, 3]
    assert [record["child"] for record in few["children"]] == [0, 4, 19]
    world.has_head = False
    assert "no output head" in pushed(world, teacher)["why"]


# cos(m, l_tokens)


@pytest.mark.parametrize("planted", [True, False])
def test_agreement_finds_planted_directions_and_nothing_in_noise(planted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    concepts = tiny.concepts(6, 2)
    width = 400
    sigma = torch.rand(width, generator=generator).double() + 0.5
    geometry = CausalGeometry.from_covariance(torch.diag(sigma), shrinkage=0.0)
    parents = torch.randn(6, width, generator=generator).double()
    deltas = torch.randn(12, width, generator=generator).double()
    names = [parent.name for parent in concepts.parents], [child.name for child in concepts.children]
    teacher = Teacher.build(
        *names, concepts.child_parent_R, parents, deltas, (geometry.sigma_sqrt, geometry.sigma_inv_sqrt)
    )
    token = torch.randint(0, 64, (6000,), generator=generator)
    owner = torch.full((64,), -1)
    for row, tokens in enumerate(concepts.child_tokens()):
        owner[tokens] = row // 2
    acts = torch.randn(6000, width, generator=generator).double()
    carried = owner[token] >= 0
    if planted:
        acts[carried] += teacher.parent_write[owner[token][carried]] * 20
    data = ConceptData(Store(train={"acts": acts.float(), "next_token": token}), concepts, "next_token", 64)
    found = teacher_agreement(data, teacher, acts.mean(0))
    for words in ("same_words", "other_words"):
        own, margin = found[words]["cosine"], found[words]["margin"]
        assert own["n"] == 6
        assert abs(found[words]["random"]["value"]) < 4 / math.sqrt(6 * width)
        if planted:
            assert own["value"] > 0.7
            assert margin["ci95"][0] > 0.5
        else:
            assert abs(own["value"]) < 4 / math.sqrt(6 * width)
    assert found["same_words"]["parents"]["parent"] == [0, 1, 2, 3, 4, 5]
    none = teacher_agreement(replace(data, min_rows=10**6), teacher, acts.mean(0))
    assert none["same_words"]["cosine"]["value"] is None
    assert json.dumps(none, allow_nan=False)
