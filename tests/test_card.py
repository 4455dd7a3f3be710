"""What a saved model says of itself, what its units write, and steering with them; rows of every kind."""

import json
import shutil

import pytest
import tiny
import torch
from models import factored
from running import ARMS, SMOKE, contents, hsae

from polytope_hsae import BatchTopKSAE, HierarchicalSAE, JumpReLUSAE, LanguageModel, SparseAutoencoder, TopKSAE
from polytope_hsae.config import BatchTopKConfig, HSAEConfig, JumpReLUConfig, TopKConfig
from polytope_hsae.fileio import read_json
from polytope_hsae.lm import FINAL_HOOK
from polytope_hsae.models.card import Card

NESTED = factored(n_parents=8, topk_parent=2, n_children_per_parent=3, subspace_dim=4, topk_child_total=2)
DEFAULT = HSAEConfig(n_parents=8, topk_parent=2, n_children_per_parent=3, topk_child_total=2)


def card(**changes: object) -> Card:
    """A card of a model at the first block of a tiny language model."""
    geometry = {"metric": "causal", "shrinkage": 0.05, "seed": 0}
    slots = [
        {"parent": 0, "concept": "animal", "evidence": {"z": 4.5}, "children": [
            {"child": 1, "concept": "dog", "evidence": {"beta": 1.0}}]},
        {"parent": 1, "concept": "body", "evidence": {"z": None}, "children": []},
    ]  # fmt: skip
    made = {
        "model": "tiny", "revision": None, "hook": "layers.0", "tokenizer_sha256": "0" * 64, "arm": "teacher",
        "row_norm": 2.0, "geometry": geometry, "evidence_of": "unembedding", "slots": slots, "mapped": None,
        "split": None, "metrics": None,
    }  # fmt: skip
    return {**made, **changes}  # type: ignore[typeddict-item]


def described(**changes: object) -> HierarchicalSAE:
    sae = HierarchicalSAE(NESTED, tiny.WIDTH, seed=1).eval()
    sae.card = card(**changes)
    return sae


# -- the file


def test_a_card_is_saved_with_its_model_and_loaded_again(tmp_path):
    sae = described()
    sae.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "card.json"}
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    assert loaded.card == sae.card
    assert loaded.names == {0: "animal", (0, 1): "dog", 1: "body"}
    # what phase 4 mapped names a parent before what a teacher put there
    mapped = [{"parent": 1, "concept": "place", "purity": 0.5, "leakage": None, "recall": 0.1}]
    assert described(mapped=mapped).names == {0: "animal", (0, 1): "dog", 1: "place"}
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_a_model_without_a_card_is_loaded_as_before(tmp_path):
    HierarchicalSAE(NESTED, tiny.WIDTH).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "card.json").exists()
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    assert (loaded.card, loaded.names) == (None, {})
    lm = tiny.language_model()
    for call in (lambda: loaded.steer(lm, 0, 1.0), lambda: loaded.top_tokens(lm, 0)):
        with pytest.raises(ValueError, match=r"found a model without card.json, allowed: "):
            call()


def test_a_broken_card_is_refused_in_one_line(tmp_path):
    described().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "card.json"
    for text, words in (("{", "card.json: not valid JSON"), (json.dumps(card(row_norm=0.0)), "row_norm: found 0.0")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as error:
            SparseAutoencoder.from_pretrained(tmp_path / "model")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [arm["name"] for arm in ARMS])
def test_every_arm_of_a_run_has_a_card(finished, name):
    results = read_json(finished / "phase4/results.json")
    manifest = read_json(finished / "activations/manifest.json")
    evidence = read_json(finished / "phase1/evidence.json")["main"]
    concepts = read_json(finished / "phase1/concepts.json")["parents"]
    parents = read_json(finished / "phase4/latents.json")["arms"][name]["parents"]
    (folder,) = finished.glob(f"phase[23]/{name}/model")
    sae = SparseAutoencoder.from_pretrained(folder)
    found = sae.card
    for field in ("model", "revision", "hook", "tokenizer_sha256"):
        assert found[field] == manifest[field]
    assert (found["arm"], found["split"], found["metrics"]) == (name, results["split"], results["arms"][name])
    mapped = {of["latent"]: concepts[of["concept"]]["name"] for of in parents if of["mapped"]}
    assert {of["parent"]: of["concept"] for of in found["mapped"]} == mapped
    assert mapped.items() <= sae.names.items()
    if name not in ("teacher", "frozen"):  # a control's slots do not hold what their names say
        assert (found["slots"], sae.names) == ([], mapped)
        return
    taught = read_json(folder.parent / "train.json")["teacher_parents"]
    for slot, concept in zip(found["slots"], taught, strict=True):
        assert slot["concept"] == concepts[concept]["name"]
        assert slot["evidence"]["z"] == evidence["parents"]["z"][concept]
        names = [child["name"] for child in concepts[concept]["children"]]
        assert [child["concept"] for child in slot["children"]] == names
        for child in slot["children"]:
            assert sae.names[slot["parent"], child["child"]] == child["concept"]
            row = evidence["children"]["name"].index(child["concept"])
            assert child["evidence"]["beta"] == evidence["children"]["beta"][row]


def test_a_card_does_not_decide_whether_a_phase_is_skipped(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    card_file = run / "phase3/teacher/model/card.json"
    measured = card_file.read_bytes()
    changed = json.loads(measured) | {"mapped": None, "split": None, "metrics": None}
    card_file.write_text(json.dumps(changed))
    (run / "phase2/baseline/model/card.json").unlink()  # a run of an earlier version
    answer = hsae("run", *SMOKE, "--out", run)
    assert answer.code == 0, answer.err
    assert answer.out.count("done before") == 4
    assert card_file.read_bytes() == measured


# -- what a unit writes


def test_a_unit_writes_along_its_decoder_row_or_atom():
    sae = described()
    torch.testing.assert_close(sae.direction(3), sae.D[3] / sae.D[3].norm())
    atom = sae.atoms(3)[2]
    torch.testing.assert_close(sae.direction((3, 2)), atom / atom.norm())
    for unit in (8, -1, (0, 3), (8, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"^unit: found .*, allowed: a parent, 0 to 7, or \(parent, 0 to 2\)$"):
            sae.direction(unit)
    with pytest.raises(ValueError, match=r"^unit: found \(0, 0\), allowed: a parent, 0 to 9$"):
        TopKSAE(TopKConfig(n_latents=10, k=2), tiny.WIDTH).direction((0, 0))


def test_top_tokens_are_those_of_the_report(finished):
    lm = LanguageModel.load("textbook-lm-9m")
    sae = HierarchicalSAE.from_pretrained(finished / "phase3/teacher/model")
    described = read_json(finished / "phase4/latents.json")
    for parent in described["arms"]["teacher"]["parents"][:3]:
        found = sae.top_tokens(lm, parent["latent"], len(parent["writes"]))
        assert found.how == described["writes"]
        assert [list(pair) for pair in found.tokens] == parent["writes"]
        for child in parent["children"][:2]:
            found = sae.top_tokens(lm, (parent["latent"], child["index"]), len(child["writes"]))
            assert [list(pair) for pair in found.tokens] == child["writes"]


# -- steering


def sequences(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and mask [B, T] with so many tokens in each row and padding on one side."""
    generator = torch.Generator().manual_seed(3)
    T = max(lengths)
    ids, mask = torch.zeros(len(lengths), T, dtype=torch.int64), torch.zeros(len(lengths), T, dtype=torch.int64)
    for row, n in enumerate(lengths):
        part = slice(T - n, T) if side == "left" else slice(0, n)
        ids[row, part] = torch.randint(1, tiny.VOCAB, (n,), generator=generator)
        mask[row, part] = 1
    return ids, mask


def by_hand(lm: LanguageModel, module: str, vector: torch.Tensor, mask: torch.Tensor):
    """A hook that adds the vector to all tokens but each row's first, in passes of whole sequences."""
    places = mask.bool() & (mask.cumsum(1) > 1)

    def add(module, args, output):
        acts = output[0] if isinstance(output, tuple) else output
        acts = acts + places[:, -acts.shape[1] :, None] * vector
        return (acts, *output[1:]) if isinstance(output, tuple) else acts

    return lm.model.get_submodule(module).register_forward_hook(add)


FIRST = {"llama": "model.layers.0", "neox": "gpt_neox.layers.0", "gemma2": "model.layers.0"}


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_steered_pass_is_one_with_the_vector_added_by_hand(kind, side):
    lm, sae = tiny.language_model(kind), described()
    ids, mask = sequences([9, 4, 1], side)
    for unit in (2, (2, 1)):
        with torch.no_grad():
            plain = lm.model(input_ids=ids, attention_mask=mask).logits
            with sae.steer(lm, unit, -1.5):
                steered = lm.model(input_ids=ids, attention_mask=mask).logits
            handle = by_hand(lm, FIRST[kind], -1.5 * 2.0 * sae.direction(unit), mask)
            expected = lm.model(input_ids=ids, attention_mask=mask).logits
            handle.remove()
        assert torch.equal(steered, expected)
        kept = mask.bool()
        assert not torch.allclose(steered[0][kept[0]][1:], plain[0][kept[0]][1:], atol=1e-3)
        first = (mask.cumsum(1) == 1) & kept
        assert torch.equal(steered[first], plain[first])  # nothing was added there, nor before
        assert torch.equal(lm.model(input_ids=ids, attention_mask=mask).logits, plain)  # the hook is gone


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("use_cache", [True, False])
def test_steered_generation_is_that_of_whole_steered_passes(kind, use_cache):
    lm, sae, new = tiny.language_model(kind), described(), 6
    lm.model.generation_config.eos_token_id = None
    ids, mask = sequences([7, 3, 5], "left")
    options = {"max_new_tokens": new, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    with sae.steer(lm, 4, 3.0):
        steered = lm.model.generate(input_ids=ids, attention_mask=mask, **options)
    plain = lm.model.generate(input_ids=ids, attention_mask=mask, **options)
    grown, grown_mask = ids, mask
    for _ in range(new):
        handle = by_hand(lm, FIRST[kind], 3.0 * 2.0 * sae.direction(4), grown_mask)
        with torch.no_grad():
            position = (grown_mask.cumsum(1) - 1).clamp_min(0)
            logits = lm.model(input_ids=grown, attention_mask=grown_mask, position_ids=position).logits[:, -1]
        handle.remove()
        grown = torch.cat([grown, logits.argmax(1, keepdim=True)], dim=1)
        grown_mask = torch.cat([grown_mask, torch.ones(len(grown_mask), 1, dtype=torch.int64)], dim=1)
    assert torch.equal(steered, grown)
    assert not torch.equal(steered, plain)
    assert torch.equal(lm.model.generate(input_ids=ids, attention_mask=mask, **options), plain)


def test_steering_at_the_final_residual_moves_the_logits_by_the_unembedding():
    lm, sae = tiny.language_model(), described(hook=FINAL_HOOK)
    ids, _ = sequences([8, 8], "left")
    plain = lm.capture(ids, FINAL_HOOK, logits=True).logits
    with sae.steer(lm, 1, 0.5), torch.no_grad():
        steered = lm.model(input_ids=ids).logits
        last = lm.model(input_ids=ids, logits_to_keep=1).logits
    moved = lm.unembedding @ (0.5 * 2.0 * sae.direction(1))
    torch.testing.assert_close(steered[:, 1:], plain[:, 1:] + moved, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steered[:, 0], plain[:, 0])
    torch.testing.assert_close(last[:, 0], steered[:, -1])


def test_steering_ends_with_its_block_whatever_ends_it():
    lm, sae = tiny.language_model(), described()
    ids, _ = sequences([6, 6], "left")

    @torch.no_grad()
    def logits(**options: torch.Tensor) -> torch.Tensor:
        return lm.model(input_ids=ids, **options).logits

    plain = logits()
    wide = HierarchicalSAE(NESTED, 2 * tiny.WIDTH)
    wide.card = card()
    square = torch.ones(2, 1, 6, 6)
    for model, options, words in (
        (wide, {}, r"found a vector of width 32, allowed: 16 at model\.layers\.0"),
        (sae, {"attention_mask": square}, r"found an attention_mask of \(2, 1, 6, 6\)"),
    ):
        with pytest.raises(ValueError, match=words), model.steer(lm, 0, 1.0):
            logits(**options)
        assert torch.equal(logits(), plain)
    with sae.steer(lm, 0, 1.0), sae.steer(lm, (1, 1), 2.0):  # both are added
        both = logits()
    handle = by_hand(lm, "model.layers.0", 2.0 * sae.direction(0) + 4.0 * sae.direction((1, 1)), torch.ones_like(ids))
    torch.testing.assert_close(both, logits())
    handle.remove()
    assert torch.equal(logits(), plain)


# -- rows of every kind


def models() -> dict[str, SparseAutoencoder]:
    width, flat = tiny.WIDTH, {"n_latents": 24, "k": 3}
    made: dict[str, SparseAutoencoder] = {
        "nested": HierarchicalSAE(NESTED, width),
        "default": HierarchicalSAE(DEFAULT, width),
        "noisy": HierarchicalSAE(NESTED.model_copy(update={"gate": "straight_through"}), width),
        "unit_row": HierarchicalSAE(DEFAULT, width, "unit_row"),
        "topk": TopKSAE(TopKConfig(**flat), width),
        "batchtopk": BatchTopKSAE(BatchTopKConfig(**flat), width),
        "jumprelu": JumpReLUSAE(JumpReLUConfig(**flat, initial_threshold=0.5), width),
    }
    for sae in made.values():
        sae.set_normalization(torch.full((width,), 0.1), 1.3)
        sae.initialize_bias([rows()])
        sae.calibrate([rows()], 3)
    return made


def rows(n: int = 64) -> torch.Tensor:
    return torch.randn(n, tiny.WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", models())
def test_encode_in_training_mode_is_encode(name):
    sae, h = models()[name].eval(), rows()
    expected = sae.encode(h)
    sae.train()
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    for _ in range(2):
        for found, wanted in zip(sae.encode(h), expected, strict=True):
            assert found is wanted is None or torch.equal(found, wanted)
    torch.testing.assert_close(sae.reconstruct(h), sae.decode(expected), rtol=0, atol=0)
    assert all(module.training for module in sae.modules())
    assert all(torch.equal(before[key], value) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_any_float_type_give_codes_of_the_models(name, dtype):
    sae, h = models()[name].eval(), rows().to(dtype)
    codes = sae.encode(h)
    for found, wanted in zip(codes, sae.encode(h.float()), strict=True):
        assert found is wanted is None or torch.equal(found, wanted)
    doubled = codes._replace(parent_value=codes.parent_value.double(), child_value=codes.child_value.double())
    assert {sae.decode(codes).dtype, sae.decode(doubled).dtype, sae.reconstruct(h).dtype} == {torch.float32}
    sae.initialize_bias([h])
    sae.calibrate([h], 3)
    assert sae.train()(h, torch.Generator().manual_seed(0)).x_hat.dtype == torch.float32


@pytest.mark.parametrize("name", models())
def test_constant_single_and_no_rows(name):
    sae = models()[name].eval()
    for h in (torch.full((5, tiny.WIDTH), 2.0), torch.zeros(5, tiny.WIDTH), rows(1)):
        one = sae.reconstruct(h[:1])
        assert torch.isfinite(one).all()
        torch.testing.assert_close(sae.reconstruct(h), one.expand_as(h))
        sae.initialize_bias([h])
        sae.calibrate([h], 3)
        assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())
    assert sae.reconstruct(rows(0)).shape == (0, tiny.WIDTH)


@pytest.mark.parametrize("name", models())
def test_rows_that_are_no_rows_are_refused_in_one_line(name):
    sae, broken = models()[name], rows()
    broken[3, 2] = torch.nan
    codes = sae.encode(rows())
    value = codes.parent_value.clone()
    value[4, 0] = torch.inf
    found = r"found NaN or an infinity in row"
    calls = [
        (lambda: sae.encode(broken), rf"^encode: {found} 3 of rows, allowed: finite"),
        (lambda: sae.reconstruct(broken), rf"^encode: {found} 3 of rows, allowed: finite"),
        (lambda: sae.encode(rows().long()), r"^encode: found rows of torch.int64, allowed: a float type$"),
        (lambda: sae.initialize_bias([broken]), rf"^batches: {found} 3 of rows"),
        (lambda: sae.decode(codes._replace(parent_value=value)), rf"^decode: {found} 4 of parent_value, allowed: fin"),
    ]
    if name not in ("nested", "noisy", "topk"):  # those have no thresholds, and look at no row
        calls.append((lambda: sae.calibrate([broken], 3), rf"{found} 3 of rows"))
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_rows_that_are_all_the_same_have_no_scale():
    with pytest.raises(ValueError, match=r"^data_scale: found 0.0, allowed: above 0, so rows that differ$"):
        HierarchicalSAE(NESTED, tiny.WIDTH).set_normalization(torch.ones(tiny.WIDTH), 0.0)
