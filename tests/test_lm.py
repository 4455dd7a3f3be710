"""Language models: the unembedding, capture, splicing, and what is refused. Sizes: tests/tiny.py."""

import copy
import json

import pytest
import tiny
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationMixin,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.lm.edits import EditedRuns, LastPosition

KINDS = ("llama", "neox", "gemma2")
INNER = {"llama": "model.layers.0", "neox": "gpt_neox.layers.0", "gemma2": "model.layers.0"}


SIZES = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
NARROW = {"num_attention_heads": 2, "intermediate_size": 32}


def in_memory(model: PreTrainedModel) -> LanguageModel:
    return LanguageModel(model.eval(), tiny.tokenizer(), name="tiny", has_head=isinstance(model, GenerationMixin))


def ids(rows: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_unembedding_gives_the_models_logits(kind: str) -> None:
    lm = tiny.language_model(kind)
    with torch.no_grad():
        expected = lm.model(input_ids=ids()).logits
    captured = lm.capture(ids(), FINAL_HOOK, logits=True)
    torch.testing.assert_close(captured.logits, expected)
    torch.testing.assert_close(lm.logits_from_final(captured.acts), expected, rtol=1e-4, atol=1e-5)
    assert lm.check_unembedding(ids()) < 1e-5
    assert lm.softcap == (2.0 if kind == "gemma2" else None)
    tied = lm.unembedding.data_ptr() == lm.model.get_input_embeddings().weight.data_ptr()
    assert tied == (kind != "neox")


def test_a_bias_and_a_logit_scale_are_part_of_the_unembedding() -> None:
    model = tiny.model("neox")
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(tiny.VOCAB))
    lm = LanguageModel(model, tiny.tokenizer(), name="biased", has_head=True)
    assert lm.unembedding_bias is not None
    assert lm.check_unembedding(ids()) < 1e-5

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    scaled = in_memory(CohereForCausalLM(CohereConfig(**SIZES, **NARROW, **special, logit_scale=0.25)))
    assert scaled.check_unembedding(ids()) < 1e-5


def test_logits_that_are_not_the_unembeddings_are_refused() -> None:
    lm = tiny.language_model("llama")
    lm.unembedding = lm.unembedding * 1.01
    with pytest.raises(ValueError, match="logits are not U h of the final residual"):
        lm.check_unembedding(ids())


@pytest.mark.parametrize("kind", KINDS)
def test_an_inner_capture_is_the_modules_output(kind: str) -> None:
    lm = tiny.language_model(kind)
    with torch.no_grad():
        hidden = lm.model(input_ids=ids(), output_hidden_states=True).hidden_states
    captured = lm.capture(ids(), INNER[kind], final=True)
    torch.testing.assert_close(captured.acts, hidden[1])
    torch.testing.assert_close(captured.final, hidden[-1])
    assert captured.logits is None


def padded() -> torch.Tensor:
    """A mask that keeps the first five tokens of the second sequence."""
    mask = torch.ones_like(ids())
    mask[1, 5:] = 0
    return mask


def test_the_head_sees_one_position_when_logits_are_not_asked_for() -> None:
    lm = tiny.language_model("llama")
    seen: list[int] = []
    lm.head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    lm.capture(ids(), FINAL_HOOK)
    lm.capture(ids(), "model.layers.1", logits=True)
    assert seen == [1, ids().shape[1]]
    with pytest.raises(ValueError, match=r"model\.hook: found 'lm_head'"):
        lm.capture(ids(), "lm_head")


@pytest.mark.parametrize("kind", KINDS)
def test_an_inner_capture_ends_the_pass_and_changes_no_activation(kind: str) -> None:
    lm = tiny.language_model(kind)
    second = INNER[kind].replace(".0", ".1")
    ran: list[str] = []
    for name, module in {**{name: lm._modules[name] for name in (INNER[kind], second)}, "head": lm.head}.items():
        module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))

    def capture(hook: str, **options: object) -> tuple[object, list[str]]:
        ran.clear()
        return lm.capture(ids(), hook, **options), [*ran]

    whole = [INNER[kind], second, "head"]
    expected, _ = capture(FINAL_HOOK, logits=True)
    for mask in (None, padded()):
        full, ran_full = capture(INNER[kind], mask=mask, final=True)
        stopped, ran_stopped = capture(INNER[kind], mask=mask)
        assert (ran_full, ran_stopped) == (whole, whole[:1])
        assert torch.equal(stopped.acts, full.acts)
    # A pass that was ended leaves nothing behind for the next one.
    after, ran_after = capture(FINAL_HOOK, logits=True)
    assert torch.equal(after.logits, expected.logits)
    assert ran_after == whole


def by_full_passes(lm: LanguageModel, tokens: torch.Tensor, hook: str, added: torch.Tensor) -> torch.Tensor:
    """Logits [G,M,V] with `added` [G,M,d] at the last position, one whole pass per edit."""

    def edit(acts: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return torch.cat([acts[:, :-1], acts[:, -1:] + vector[:, None]], dim=1)

    passes = [lm.run_with_edit(tokens, hook, lambda acts, v=v: edit(acts, v), last_only=True) for v in added]
    return torch.stack(passes)


@pytest.mark.parametrize("length", [2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_position_alone_gives_the_logits_of_whole_passes(kind: str, length: int) -> None:
    lm = tiny.language_model(kind)
    tokens = ids(length=length)
    # Half of gemma2's layers have a sliding window (16, shorter than the longer contexts): it runs in full.
    cached = kind != "gemma2"
    for hook in (INNER[kind], INNER[kind].replace(".0", ".1"), FINAL_HOOK):
        last = LastPosition(lm, tokens, hook)
        assert last.cached == cached
        for n_edits in (4, 1):
            added = torch.randn(n_edits, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(n_edits))
            expected = by_full_passes(lm, tokens, hook, added)
            for _ in range(2):
                found = last.logits(added)
                assert found.shape == (n_edits, 3, tiny.VOCAB)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        clean = lm.capture(tokens, FINAL_HOOK, logits=True).logits
        torch.testing.assert_close(last.logits(torch.zeros_like(added))[0], clean[:, -1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected[0], clean[:, -1], atol=1e-2)


def test_an_edit_of_the_last_position_runs_one_token_where_the_cache_is_plain() -> None:
    lm = tiny.language_model("llama")
    shapes: list[tuple[int, ...]] = []
    second = lm._modules["model.layers.1"]
    second.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape[:2])))
    LastPosition(lm, ids(), "model.layers.0").logits(torch.zeros(4, 3, tiny.WIDTH))
    assert shapes == [(3, 8), (12, 1)]
    assert not LastPosition(lm, ids(length=1), "model.layers.0").cached


def test_recurrent_states_are_no_plain_cache() -> None:
    lm = in_memory(MambaForCausalLM(MambaConfig(**SIZES, state_size=4)))
    last, added = LastPosition(lm, ids(), "backbone.layers.0"), torch.ones(2, 3, 16)
    assert not last.cached
    expected = by_full_passes(lm, ids(), "backbone.layers.0", added)
    torch.testing.assert_close(last.logits(added), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["final", "inner", "inside"])
def test_many_edits_give_the_same_logits_and_run_the_first_blocks_once(kind: str, place: str) -> None:
    lm = tiny.language_model(kind)
    blocks = list(lm.model.get_submodule(INNER[kind].removesuffix(".0")))
    last = INNER[kind].replace(".0", f".{len(blocks) - 1}")
    hook = {"final": FINAL_HOOK, "inner": INNER[kind], "inside": f"{last}.mlp"}[place]
    whole = {"final": len(blocks), "inner": 1, "inside": len(blocks) - 1}[place]
    mask = padded()
    edits = [lambda acts: acts, lambda acts: acts.flip(2), lambda acts: acts + 0.1]
    expected = [lm.run_with_edit(ids(), hook, edit, mask=mask) for edit in edits]
    torch.testing.assert_close(expected[0], lm.capture(ids(), FINAL_HOOK, mask=mask, logits=True).logits)
    assert not torch.allclose(expected[1], expected[0], atol=1e-2)
    ran: list[int] = []
    for number, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    runs = EditedRuns(lm, ids(), hook, mask)
    for edit, logits in zip(edits, expected, strict=True):
        assert torch.equal(runs.logits(edit), logits)
    assert [ran.count(number) for number in range(len(blocks))] == [1] * whole + [3] * (len(blocks) - whole)
    torch.testing.assert_close(lm.run_with_edit(ids(), hook, edits[1], mask=mask), expected[1])
    assert ran.count(0) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_added_at_the_final_residual_moves_logits_by_u_v(kind: str) -> None:
    lm = tiny.language_model(kind)
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(2))
    clean = lm.capture(ids(), FINAL_HOOK, logits=True).logits
    moved = lm.run_with_edit(ids(), FINAL_HOOK, lambda acts: acts + vector)
    if lm.softcap is not None:
        clean, moved = (lm.softcap * torch.atanh((z / lm.softcap).double()) for z in (clean, moved))
    expected = (lm.unembedding @ vector).to(moved.dtype).expand_as(moved)
    torch.testing.assert_close(moved - clean, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("hook", [FINAL_HOOK, "model.layers.0"])
def test_padding_changes_no_real_position_and_last_only_finds_the_last_token(hook: str) -> None:
    lm = tiny.language_model("llama")
    tokens, mask = ids(), padded()
    full = lm.run_with_edit(tokens, hook, lambda acts: acts + 0.1, mask=mask)
    alone = lm.run_with_edit(tokens[1:2, :5], hook, lambda acts: acts + 0.1)
    torch.testing.assert_close(full[1:2, :5], alone, rtol=1e-4, atol=1e-4)
    last = lm.run_with_edit(tokens, hook, lambda acts: acts + 0.1, mask=mask, last_only=True)
    torch.testing.assert_close(last, torch.stack([full[0, -1], full[1, 4], full[2, -1]]))
    with pytest.raises(ValueError, match="padding \\(on the right\\)"):
        lm.capture(tokens, hook, mask=mask.flip(1))


def test_hooks_that_cannot_be_captured_are_refused() -> None:
    lm = tiny.language_model("llama")
    repeated = tiny.model("llama")
    repeated.model.layers[1] = repeated.model.layers[0]
    twice = LanguageModel(repeated, tiny.tokenizer(), name="twice", has_head=True)
    zeros = torch.zeros(1, 3, tiny.WIDTH)
    for call, message in (
        (lambda: lm.capture(ids(), "model.layer.1"), r"no module .* in tiny-llama; close matches: .*model\.layers\.1"),
        (lambda: lm.capture(ids(), "model.layers"), r"'model.layers' ran 0 times in a pass, allowed: exactly once"),
        (lambda: lm.run_with_edit(ids(), "model.layers", lambda acts: acts), "ran 0 times"),
        (lambda: twice.capture(ids(), "model.layers.0", final=True), "ran 2 times"),
        (lambda: LastPosition(twice, ids(), "model.layers.0").logits(zeros), "ran 2 times"),
        (lambda: LastPosition(lm, ids(), "model.layers").logits(zeros), "ran 0 times"),
        (lambda: lm.capture(ids(), "model.rotary_emb"), "'model.rotary_emb' gives"),
        (lambda: lm.capture(torch.zeros(0, 3, dtype=torch.int64), FINAL_HOOK), "ids: found shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # A refused hook leaves nothing behind.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


BLOCKS = {
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "gemma2": "model.layers",
    "qwen2": "model.layers",
    "bert": "bert.encoder.layer",
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.filterwarnings("ignore:tiny has no output head")
def test_a_block_is_named_by_its_number_in_any_family(kind: str) -> None:
    lm = in_memory(tiny.family(kind, tiny.tokenizer()))
    assert lm.max_context == 128
    lm.require_context(128)
    with pytest.raises(ValueError, match=r"^corpus.context_length: found 129, allowed: at most 128, what tiny reads$"):
        lm.require_context(129)
    for number in (0, 1, -1, -2):
        assert lm.resolve_hook(f"layers.{number}") == f"{BLOCKS[kind]}.{number % 2}"
    for number in (2, -3):
        with pytest.raises(ValueError, match=rf"found 'layers.{number}', allowed: layers.-2 to layers.1 for tiny"):
            lm.resolve_hook(f"layers.{number}")
    first = lm.capture(ids(), lm.resolve_hook("layers.-2")).acts
    with torch.no_grad():
        hidden = lm.model(input_ids=ids(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(first, hidden[1])
    for hook in (FINAL_HOOK, f"{BLOCKS[kind]}.1"):
        assert lm.resolve_hook(hook) == hook
    with pytest.raises(ValueError, match=r"no module 'layer.1' in tiny; close matches: "):
        lm.resolve_hook("layer.1")
    if lm.has_head:
        lm.check_unembedding(ids())
        lm.check_causal(ids()[:1])


def test_the_text_models_blocks_are_meant_where_there_is_a_vision_tower() -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**vision, "vocab_size": tiny.VOCAB, "head_dim": 8, "num_key_value_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    lm = in_memory(Gemma3ForConditionalGeneration(config))
    assert lm.resolve_hook("layers.-1") == "model.language_model.layers.1"
    assert lm.capture(ids(), "model.language_model.layers.1").acts.shape == (3, 9, 16)
    assert lm.check_unembedding(ids()) < 1e-5


@pytest.mark.filterwarnings("ignore:tiny has no output head")
def test_what_configs_say_in_other_words() -> None:
    assert in_memory(MambaForCausalLM(MambaConfig(**SIZES, state_size=4))).max_context is None
    roberta = RobertaConfig(**SIZES, **NARROW, max_position_embeddings=34, pad_token_id=1)
    assert in_memory(RobertaModel(roberta)).max_context == 32
    # ALBERT's blocks are one block run twice, and its embeddings are narrower than its hidden states.
    albert = in_memory(AlbertModel(AlbertConfig(**SIZES, **NARROW, embedding_size=8)))
    with pytest.raises(ValueError, match="tiny has no single list of blocks; name a module"):
        albert.resolve_hook("layers.0")
    with pytest.raises(ValueError, match=r"of width 16, but tiny's embeddings have 8, allowed: layers.N"):
        albert.resolve_hook(FINAL_HOOK)
    # The first GPT's blocks return lists.
    gpt = in_memory(OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=tiny.VOCAB, n_embd=16, n_layer=2, n_head=2)))
    hook = gpt.resolve_hook("layers.0")
    same = gpt.run_with_edit(ids(), hook, lambda acts: acts)
    torch.testing.assert_close(same, gpt.capture(ids(), FINAL_HOOK, logits=True).logits)
    assert not torch.allclose(gpt.run_with_edit(ids(), hook, lambda acts: acts + acts.flip(2)), same, atol=1e-3)
    # Another name for the soft-cap.
    config = RecurrentGemmaConfig(**SIZES, **NARROW, num_key_value_heads=1, logits_soft_cap=0.5)
    capped = in_memory(RecurrentGemmaForCausalLM(config))
    assert capped.softcap == 0.5
    assert capped.check_unembedding(ids()) < 1e-5


def test_loading_a_folder(tmp_path) -> None:
    folder = tiny.save(tmp_path / "tiny-model")
    lm = LanguageModel.load(str(folder))
    assert (lm.name, lm.width, lm.vocab_size, lm.has_head) == ("tiny-model", tiny.WIDTH, tiny.VOCAB, True)
    assert str(lm.revision).startswith("sha256:")
    assert len(lm.tokenizer_sha256) == 64
    torch.testing.assert_close(lm.unembedding, tiny.language_model().unembedding)
    assert LanguageModel.load(str(folder), dtype="bfloat16").capture(ids(), FINAL_HOOK).acts.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_within_in_float32_a_bfloat16_model_computes_as_its_weights_would_in_float32(kind: str) -> None:
    rounded = tiny.model(kind).to(torch.bfloat16)
    stored = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
    lm, wide = in_memory(rounded), in_memory(copy.deepcopy(rounded).float())
    before = lm.capture(ids(), INNER[kind], logits=True)
    with lm.in_float32():
        inside, expected = (model.capture(ids(), INNER[kind], logits=True) for model in (lm, wide))
    assert torch.equal(inside.acts, expected.acts)
    assert torch.equal(inside.logits, expected.logits)
    assert not torch.equal(inside.logits, before.logits)
    assert torch.equal(lm.capture(ids(), INNER[kind], logits=True).logits, before.logits)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, stored[name])
        assert tensor.dtype == torch.bfloat16


def test_a_model_without_a_head_says_so(tmp_path) -> None:
    folder = tiny.save(tmp_path / "headless")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"no output head \(LlamaModel\): its input embeddings stand in"):
        lm = LanguageModel.load(str(folder))
    assert not lm.has_head
    assert torch.equal(lm.unembedding, lm.model.get_input_embeddings().weight)
    with_head = tiny.language_model().capture(ids(), FINAL_HOOK).acts
    torch.testing.assert_close(lm.capture(ids(), FINAL_HOOK).acts, with_head)
    for call in (
        lambda: lm.capture(ids(), FINAL_HOOK, logits=True),
        lambda: lm.run_with_edit(ids(), FINAL_HOOK, lambda acts: acts),
        lambda: LastPosition(lm, ids(), "layers.0"),
        lambda: lm.logits_from_final(with_head),
        lambda: lm.check_unembedding(ids()),
    ):
        with pytest.raises(ValueError, match=r"no output head, .*: not available"):
            call()
