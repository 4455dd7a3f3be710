"""Trackers beside metrics.jsonl, against stand-ins for the packages they need."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from polytope_hsae.config import ConfigError, load_config
from polytope_hsae.tracking import open_trackers


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb that remembers what it was told."""
    told = {"logged": [], "finished": 0}

    def init(**options):
        told["options"] = options
        return SimpleNamespace(
            log=lambda values, step: told["logged"].append((step, values)),
            finish=lambda: told.update(finished=told["finished"] + 1),
        )

    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_gets_the_same_numbers_and_offline_needs_no_account(tmp_path, wandb):
    config = load_config("smoke", ["tracking.wandb=offline"])
    trackers = open_trackers(config, tmp_path, config.arm("baseline"), 0)
    trackers.log({"loss": 0.5}, step=3, tokens=24)
    trackers.close()
    assert wandb["options"]["mode"] == "offline"
    assert wandb["options"]["name"] == "smoke-phase2-baseline"
    assert wandb["options"]["config"]["run"]["name"] == "smoke"
    assert wandb["logged"] == [(3, {"loss": 0.5, "tokens": 24})]
    assert wandb["finished"] == 1
    assert '"name": "loss", "value": 0.5' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("field", "package"), [("tracking.wandb=online", "wandb"), ("tracking.tensorboard=true", "tensorboard")]
)
def test_a_missing_tracker_is_one_clear_line(tmp_path, monkeypatch, field, package):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    config = load_config("smoke", [field])
    with pytest.raises(ConfigError, match=rf"pip install polytope-hsae\[{package}\]"):
        open_trackers(config, tmp_path, config.arm("baseline"), 0)
