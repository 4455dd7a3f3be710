"""The JAX fixture against plain NumPy with loops."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/data/jax_hsae.safetensors"
LEAVES = "top_level_autoencoder.encoder", "top_level_autoencoder.decoder"
LEAVES += "W_down", "W_up", "encoder_weights", "decoder_weights"
VARIANTS = "narrow", "wide"


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def configs() -> dict[str, dict]:
    with safe_open(FIXTURE, "np") as file:
        return json.loads(file.metadata()["fixture"])["configs"]


@pytest.fixture
def scripts(monkeypatch):
    """The scripts can be imported; the test is skipped where JAX is not installed."""
    for name in ("jax", "equinox", "optax"):
        pytest.importorskip(name)
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), str(ROOT / "benchmarks"), *sys.path])


def under(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def rows_in_units(h: np.ndarray) -> np.ndarray:
    h = h.astype(np.float64)
    return h / (np.linalg.norm(h, axis=1, keepdims=True) + 1e-6)


def naive_parts(leaves: dict[str, np.ndarray], x: np.ndarray, k: int) -> tuple[dict[str, float], int]:
    """Loss parts one row, parent and child at a time; and the number of rows with fewer than k codes."""
    E, D, down, up, F, G = (leaves[name].astype(np.float64) for name in LEAVES)
    P, d = E.shape
    threshold = leaves["threshold"].astype(np.float64)
    parts = dict.fromkeys(("recon", "recon_top", "l1_parent", "l1_child", "orth"), 0.0)
    n_short = 0
    for row in x:
        codes = [r if (r := float(E[p] @ row)) >= threshold else 0.0 for p in range(P)]
        parts["l1_parent"] += sum(map(abs, codes)) / len(x)
        left = list(codes)
        top_level, children = np.zeros(d), np.zeros(d)
        for _ in range(k):
            p = max(range(P), key=lambda p: left[p])  # the first of equals
            n_short += left[p] == 0
            left[p] = -math.inf
            q = [float(f @ (down[p] @ row)) for f in F[p]]
            child_codes = [value if value >= threshold else 0.01 * value for value in q]
            parts["l1_child"] += sum(map(abs, child_codes)) / len(x)
            top_level += codes[p] * D[:, p]
            if codes[p] > 0:
                best = max(range(len(q)), key=lambda c: child_codes[c])
                children += child_codes[best] * (up[p] @ G[p][:, best])
        parts["recon"] += sum((row - top_level - children) ** 2) / len(x)
        parts["recon_top"] += sum((row - top_level) ** 2) / len(x)
    unit_D = [D[:, p] / (np.linalg.norm(D[:, p]) + 1e-6) for p in range(P)]
    unit_E = [E[p] / (np.linalg.norm(E[p]) + 1e-6) for p in range(P)]
    squares = sum((unit_D[i] @ unit_E[j] - unit_D[j] @ unit_E[j]) ** 2 for i in range(P) for j in range(P))
    parts["orth"] = math.sqrt(squares) / (P * P - P)
    return parts, n_short


def naive_total(leaves: dict[str, np.ndarray], x: np.ndarray, k: int, warmup: float) -> float:
    parts, _ = naive_parts(leaves, x, k)
    penalties = 1e-3 * (parts["l1_parent"] + parts["l1_child"]) + 0.1 * parts["orth"]
    return parts["recon"] + 0.1 * parts["recon_top"] + warmup * penalties


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_step_agrees_with_loops(stored, configs, variant):
    leaves, x = under(stored, f"{variant}/start/"), rows_in_units(stored[f"{variant}/inputs"][0])
    k = configs[variant]["k"]
    parts, n_short = naive_parts(leaves, x, k)
    for name, value in parts.items():
        assert stored[f"{variant}/float64/{name}"][0] == pytest.approx(value, abs=1e-12), name
    assert n_short > 0  # some row has fewer than k codes above the threshold
    assert stored[f"{variant}/float64/loss"][0] == pytest.approx(naive_total(leaves, x, k, warmup=0), abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_gradient_agrees_with_differences(stored, configs, variant):
    """Two entries of every leaf: the largest of the gradient, and a random one."""
    leaves = {name: value.astype(np.float64) for name, value in under(stored, f"{variant}/start/").items()}
    gradient = under(stored, f"{variant}/float64/gradients/0/raw/")
    rng = np.random.default_rng(0)
    x, step = rows_in_units(stored[f"{variant}/inputs"][0]), 1e-5
    for name in LEAVES:
        for entry in (np.abs(gradient[name]).argmax(), rng.integers(gradient[name].size)):
            ends = []
            for sign in (1, -1):
                moved = leaves[name].copy()
                moved.flat[entry] += sign * step
                ends.append(naive_total(leaves | {name: moved}, x, configs[variant]["k"], warmup=0))
            assert gradient[name].flat[entry] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [0, 13])
def test_projection_and_clipping(stored, variant, step):
    raw, projected, clipped = (
        under(stored, f"{variant}/float64/gradients/{step}/{stage}/") for stage in ("raw", "projected", "clipped")
    )
    norm = math.sqrt(sum((value**2).sum() for value in projected.values()))
    assert stored[f"{variant}/float64/grad_norm"][step] == pytest.approx(norm)
    assert (norm > 0.75) == (step == 0)
    for name in raw:
        np.testing.assert_allclose(clipped[name], projected[name] * min(1, 0.75 / norm), atol=1e-14)
        if "decoder" not in name:
            np.testing.assert_array_equal(projected[name], raw[name])
    if step == 0:  # the rows themselves are in the file
        for name, axis in (("top_level_autoencoder.decoder", 0), ("decoder_weights", 1)):
            rows = stored[f"{variant}/start/{name}"].astype(np.float64)
            assert np.abs((projected[name] * rows).sum(axis)).max() < 1e-12
            assert np.abs((raw[name] * rows).sum(axis)).max() > 1e-3
            removed = raw[name] - projected[name]
            along = (removed * rows).sum(axis, keepdims=True) / (rows**2).sum(axis, keepdims=True)
            np.testing.assert_allclose(removed, along * rows, atol=1e-12)


def test_ties_go_to_the_lowest_index(stored):
    assert stored["ties/parents"].tolist() == [[1, 2, 3], [4, 5, 0], [0, 1, 2], [0, 1, 2], [0, 4, 5], [0, 1, 2]]
    codes = [[1, 1, 1], [0.75, 0.75, 0], [0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert stored["ties/parent_codes"].tolist() == codes
    assert stored["ties/children"][:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    np.testing.assert_allclose(stored["ties/child_codes"][:, 0], [1, 0.75, 0.5, 0, 1, -0.01], rtol=1e-6)
    assert not stored["ties/child_codes"][stored["ties/parent_codes"] == 0].any()


def test_live_training_repeats_the_fixture(scripts, stored):
    import jax_hsae

    with jax_hsae.precision("float32"):
        config = jax_hsae.Config(steps=3)
        model = jax_hsae.init(config, "float32")
        _, log, _ = jax_hsae.train(model, lambda _, step: stored["narrow/inputs"][step], config)
    for name, values in jax_hsae.leaves(model).items():
        np.testing.assert_array_equal(values, stored[f"narrow/start/{name}"])
    for name, values in log.items():
        np.testing.assert_allclose(values, stored[f"narrow/float32/{name}"][:3], rtol=1e-5, atol=1e-6, err_msg=name)
