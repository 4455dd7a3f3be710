"""Names that are nearly right: what may be meant is said; hook names of TransformerLens."""

from pathlib import Path

import pytest
import tiny
import torch
from running import hsae, refused

from polytope_hsae.lm import FINAL_HOOK
from polytope_hsae.lm.edits import EditedRuns, LastPosition

STUDIES = Path(__file__).parents[1] / "studies"
SYNTHETIC = STUDIES / "synthetic-small" / "study.yaml"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["run", "quickstrt"], "quickstart"),
        (["phase1", "recomended"], "recommended"),
        (["concepts", "smok"], "smoke"),
        (["run", "smoke", "--set", "training.batchsize=4"], "batch_size"),
        (["run", "smoke", "--set", "corpse.path=a"], "corpus"),
        (["rum", "smoke"], "run"),
        (["sweep", "run", STUDIES / "wim" / "study.yaml"], STUDIES / "win" / "study.yaml"),
        (["sweep", "run", STUDIES / "win"], STUDIES / "win" / "study.yaml"),
        (["sweep", "run", STUDIES / "evidense" / "study.yaml"], STUDIES / "evidence" / "study.yaml"),
        (["sweep", "run", STUDIES / "synthetic-smal" / "study.yaml"], SYNTHETIC),
        (["sweep", "run", SYNTHETIC, "--only", "matryoska", "--out", "nowhere"], "matryoshka"),
        (["sweep", "run", STUDIES / "win" / "study.yaml", "--only", "batchtop", "--out", "nowhere"], "batchtopk"),
    ],
)
def test_a_misspelt_name_gets_the_one_that_is_meant(tmp_path, monkeypatch, arguments, meant):
    monkeypatch.chdir(tmp_path)
    answer = hsae(*arguments)
    refused(answer)
    assert f"id you mean {meant}?" in answer.err.replace("'", ""), answer.err


def test_hook_names_of_transformer_lens():
    lm = tiny.language_model("llama")
    ids = torch.randint(0, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(lm.capture(ids, "blocks.0.hook_resid_post").acts, hidden[1])
    torch.testing.assert_close(lm.capture(ids, "blocks.1.hook_resid_pre").acts, hidden[1])
    assert lm.resolve_hook("blocks.1.hook_resid_post") == "model.layers.1"
    for name, allowed in {
        "blocks.0.hook_resid_pre": "layers.0",
        "blocks.1.hook_mlp_out": "model.layers.1.mlp",
        "blocks.1.attn.hook_z": "model.layers.1.self_attn",
        "ln_final.hook_normalized": FINAL_HOOK,
        "hook_embed": "layers.N",
    }.items():
        with pytest.raises(ValueError, match=rf"^model.hook: found '{name}', .*allowed: .*{allowed}") as error:
            lm.capture(ids, name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"found 'layers.5', allowed: layers.-2 to layers.1"):
        lm.resolve_hook("blocks.5.hook_resid_post")


def test_hooks_are_resolved_wherever_they_are_given():
    lm = tiny.language_model("neox")
    ids = torch.randint(0, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    module = "gpt_neox.layers.0"
    assert torch.equal(lm.capture(ids, "layers.0").acts, lm.capture(ids, module).acts)
    assert torch.equal(lm.capture(ids, "layers.-2").acts, lm.capture(ids, module).acts)

    def edit(acts_BTd: torch.Tensor) -> torch.Tensor:
        return 2 * acts_BTd

    runs = EditedRuns(lm, ids, "layers.0")
    assert torch.equal(runs.logits(edit), lm.run_with_edit(ids, module, edit))
    added = torch.randn(1, 2, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LastPosition(lm, ids, "layers.0").logits(added), LastPosition(lm, ids, module).logits(added))
