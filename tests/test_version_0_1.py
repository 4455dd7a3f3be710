"""Configs and saved models of version 0.1 are read; `data/version_0_1` was written by that version."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polytope_hsae.config import BatchTopKConfig, Config, HSAEConfig
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes

SAVED = Path(__file__).parent / "data" / "version_0_1"


@pytest.mark.parametrize(
    "old, new, value",
    [
        ("router_balance_rate", "balance_rate", 0.02),
        ("router_load_max", "rate_cap", 0.2),
        ("router_load_spread", "rate_cap_spread", 1.5),
        ("load_min", "rate_floor", 0.1),
        ("child_encoder", "children", "factored"),
        ("child_decoder", "children", "factored"),
    ],
)
def test_a_renamed_key_is_read_with_a_warning(old, new, value):
    with pytest.warns(UserWarning, match=f"^{old} is now called {new}$"):
        found = HSAEConfig.model_validate({old: value})
    assert found == HSAEConfig(**{new: value}) != HSAEConfig()


def test_a_rate_of_0_still_switches_the_limits_off_under_its_old_name():
    with pytest.warns(UserWarning, match="router_balance_rate"):
        assert HSAEConfig.model_validate({"router_balance_rate": 0}) == HSAEConfig(balance_rate=0)


DELETED = [
    ("recycle_every", 0, 10),
    ("recycle_until", None, 10),
    ("split_above", None, 0.5),
    ("k_anneal_steps", 0, 10),
    ("topk_parent_start", None, 32),
    ("active_children_start", None, 8),
    ("child_input_detach", False, True),
    ("initial_router", "random", "rows"),
    ("initial_children", "random", "data"),
    ("aux_weight", 0.0, 0.1),
    ("aux_k_parent", 32, 16),
    ("aux_k_child", 8, 4),
    ("threshold_decay", 0.99, 0.9),
]


@pytest.mark.parametrize("key, default, other", DELETED)
def test_a_deleted_key_is_read_where_it_has_its_default(key, default, other):
    assert HSAEConfig.model_validate({key: default}) == HSAEConfig()
    refused(HSAEConfig, {key: other}, f"{key}: found {other}, allowed: {default}; polytope_hsae 0.1 is the last")


def test_the_decay_of_a_flat_threshold_is_read_where_it_has_its_default():
    sizes = {"n_latents": 8, "k": 2}
    assert BatchTopKConfig.model_validate({**sizes, "threshold_decay": 0.99}) == BatchTopKConfig(**sizes)


def test_the_scope_of_an_l1_is_read_where_it_is_that_of_the_codes():
    for fields in ({"l1_scope": "all"}, {"l1_scope": "selected", "l1_parent": 0.1}):
        assert HSAEConfig.model_validate(fields) == HSAEConfig(l1_parent=fields.get("l1_parent", 0.0))
    published = HSAEConfig.jax_compat()
    assert HSAEConfig.model_validate({**published.model_dump(), "l1_scope": "all"}) == published


@pytest.mark.parametrize(
    "block, fields, words",
    [
        (
            BatchTopKConfig,
            {"n_latents": 8, "k": 2, "threshold_decay": 0.5},
            "threshold_decay: found 0.5, allowed: 0.99",
        ),
        (HSAEConfig, {"l1_scope": "all", "l1_child": 0.1}, "l1_scope: found all, allowed: selected; poly"),
        (
            HSAEConfig,
            {"child_encoder": "direct", "child_decoder": "factored"},
            "child_encoder, child_decoder: found ['direct', 'factored'], allowed: one for both;",
        ),
        (Config, {"hsae": {"recycle_every": 5}}, "recycle_every: found 5, allowed: 0"),
    ],
)
def test_what_is_gone_is_refused_in_one_line(block, fields, words):
    refused(block, fields, words)


def refused(block, fields, words):
    with pytest.raises(ValueError, match=r"polytope_hsae 0\.1") as error:
        block.model_validate(fields)
    message = error.value.errors()[0]["msg"]
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["default", "factored", "batchtopk"])
def test_a_saved_model_gives_the_same_numbers(name, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\w+ is now called \w+")
        model = SparseAutoencoder.from_pretrained(SAVED / name)
    expected = load_file(SAVED / name / "expected.safetensors")
    codes = model.encode(expected["rows"])
    for field in Codes._fields:
        found = getattr(codes, field)
        if found is None:
            assert field not in expected
        else:
            torch.testing.assert_close(
                found.detach(), expected[field], msg=lambda text, field=field: f"{field}: {text}"
            )
    torch.testing.assert_close(model.reconstruct(expected["rows"]).detach(), expected["reconstruction"])
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(folder / "model.safetensors") for folder in (SAVED / name, tmp_path / "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items())
