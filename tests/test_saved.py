"""Files of saved models: exact round trips, and one clear line for every file that cannot be read."""

import json
import shutil

import pytest
import torch
from models import SHAPE, WIDTH, Roots, assert_equal_state, config, factored, generator, random_parameters

from polytope_hsae.config import FLAT_KINDS
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.phases.flat_arms import MODELS

TIED = {"use_tied_decoders_parent": True, "use_tied_decoders_child": True, "tie_projectors": True}
LITERAL = {"causal_orth_form": "literal", "causal_ortho_lambda": 0.1}
SAVED = {
    "default": (config(), "rms"),
    "default, tied": (config(use_tied_decoders_parent=True, use_tied_decoders_child=True), "rms"),
    "factored": (factored(**SHAPE), "rms"),
    "factored, tied, causal, without bias": (
        factored(**SHAPE, **TIED, use_decoder_bias=False, causal_ortho_lambda=0.1),
        "unit_row",
    ),
    "literal penalty": (factored(**SHAPE, **LITERAL), "none"),
    **{kind: (of_kind(n_latents=9, k=3), "rms") for kind, of_kind in FLAT_KINDS.items()},
    **{f"{kind}, tied": (of_kind(n_latents=9, k=3, tied=True), "rms") for kind, of_kind in FLAT_KINDS.items()},
}


@pytest.mark.parametrize("name", SAVED)
def test_saving_and_loading_is_exact(name, tmp_path):
    options, normalize = SAVED[name]
    model = MODELS.get(name.removesuffix(", tied"), HierarchicalSAE)(options, WIDTH, normalize)
    random_parameters(model)
    model.set_normalization(torch.arange(WIDTH) / 3, 1.7)
    h = torch.randn(70, WIDTH, generator=generator(0))
    model.calibrate([h], 2.0)
    if isinstance(model, HierarchicalSAE):
        model.set_metric(Roots(WIDTH).sigma)
        model.freeze(["G", "D"])  # what a frozen stage keeps beside the parameters is not part of the model
    for again in ("model", "again", "again"):  # the third time over an old one
        model.save_pretrained(tmp_path / again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "again")
    assert type(loaded) is type(model)
    assert (loaded.config, loaded.normalize, loaded.training) == (model.config, model.normalize, False)
    model.freeze(())
    assert_equal_state(model, loaded)
    assert torch.equal(loaded.reconstruct(h), model.eval().reconstruct(h))
    for encoder, decoder in (("E", "D"), ("F", "G"), ("Down", "Up")):
        if getattr(loaded, encoder, None) is not None:
            is_tied = getattr(model, encoder) is getattr(model, decoder)
            assert (getattr(loaded, encoder) is getattr(loaded, decoder)) == is_tied


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    HierarchicalSAE(config(), WIDTH).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_error(name, cls=SparseAutoencoder):
    with pytest.raises(ValueError, match=": ") as error:
        cls.from_pretrained(name)
    return one_line(error)


KINDS = "BatchTopKSAE, HierarchicalSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "Transformer"}, f"architecture: found 'Transformer', allowed: {KINDS}"),
        ({"config": {**SHAPE, "n_parrots": 3}}, "n_parrots"),
        ({"config": {**SHAPE, "topk_parent": 7}}, "topk_parent: found 7, allowed: at most n_parents = 6"),
        ({"normalize": "l2"}, "normalize: found 'l2', allowed: rms, unit_row, none"),
        ({"width": "wide"}, "width"),
        ({"width": -1}, "width"),
        ("[1, 2]", "found [1, 2], allowed: input should be a valid dictionary"),
        ("{", "config.json: not valid JSON"),
        (None, "config.json: no such file, allowed: a folder written by save_pretrained"),
    ],
)
def test_loading_a_header_that_is_broken(folder, changes, message):
    header = folder / "config.json"
    if isinstance(changes, dict):
        header.write_text(json.dumps({**json.loads(header.read_text()), **changes}))
    elif changes is None:
        header.unlink()
    else:
        header.write_text(changes)
    found = load_error(folder)
    assert message in found
    assert str(header) in found


def test_loading_another_model_or_none(folder):
    message = "config.json: architecture: found 'HierarchicalSAE', allowed: TopKSAE"
    assert load_error(folder, TopKSAE).endswith(message)
    assert "no such folder, allowed: a saved model's folder or a hub id" in load_error(folder.parent / "nowhere")


def test_loading_missing_truncated_or_misshapen_tensors(folder):
    tensors = folder / "model.safetensors"
    whole = tensors.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        tensors.write_bytes(whole[:size])
        assert "model.safetensors: not a complete safetensors file" in load_error(folder)
    tensors.unlink()
    assert "model.safetensors: no such file" in load_error(folder)
    HierarchicalSAE(config(n_parents=7), WIDTH).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "model.safetensors", tensors)
    message = load_error(folder)
    assert "D: found float32 [7, 5], allowed: float32 or float64 or float16 or bfloat16 [6, 5]" in message
    assert str(tensors) in message


def test_pickles_are_refused_by_name(folder, monkeypatch):
    tensors = folder / "model.safetensors"
    pickled = folder / "pytorch_model.bin"
    torch.save({"E": torch.zeros(2)}, pickled)
    monkeypatch.chdir(folder)
    for name in (pickled, "pytorch_model.bin", "./pytorch_model.bin"):
        message = load_error(name)
        assert message.endswith("pytorch_model.bin: found a .bin file, allowed: .safetensors (pickles are never read)")
    monkeypatch.chdir(folder.parent)
    assert "found a .bin file" in load_error("model/pytorch_model.bin")  # one slash: not a hub id when it is a file
    shutil.copy(pickled, tensors)
    assert "model.safetensors: not a complete safetensors file" in load_error(folder)
    tensors.unlink()
    assert "pytorch_model.bin: found a .bin file" in load_error(folder)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(name, **options):
        assert name == "owner/name"
        raise OSError("no route to host\nreally")

    monkeypatch.setattr("polytope_hsae.models.base.snapshot_download", fail)
    reason = "not a folder here, and the hub does not give it (no route to host really)"
    assert load_error("owner/name") == f"owner/name: {reason}"
