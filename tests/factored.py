"""The factored form of docs/method.md sections 1 and 2, which most tests of models are about."""

from typing import Any

from polytope_hsae.config import HSAEConfig

FACTORED: dict[str, Any] = {
    "n_parents": 256,
    "topk_parent": 16,
    "n_children_per_parent": 8,
    "topk_child_total": None,
    "gate": "straight_through",
    "parent_budget": "per_row",
    "child_budget": "shared",
    "child_encoder": "factored",
    "child_decoder": "factored",
    "use_tied_decoders_child": "init",
    "router_balance_rate": 0.0,
    "router_load_max": None,
    "load_min": 0.0,
}


def factored(**fields: Any) -> HSAEConfig:
    """That form with other values for some fields."""
    return HSAEConfig(**{**FACTORED, **fields})
