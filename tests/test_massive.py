"""Rows of massive norm: left out of training and of pooled metrics, counted, and named."""

import json
import shutil

import pytest
import tiny
import torch
from fakes import FakeSAE, write_store
from running import hsae
from safetensors.torch import load_file, save_file

from polytope_hsae.data.store import ActivationStore, ResidentStore
from polytope_hsae.data.stream import RowStream
from polytope_hsae.evaluation.massive import describe_norms, massive_warnings, norm_limit
from polytope_hsae.evaluation.reconstruction import evaluate_language_model, evaluate_reconstruction
from polytope_hsae.fileio import read_json, read_tensors

WIDTH, ROWS = 6, 60
MASSIVE = {"train": [0, 17, 41], "val": [], "test": [59]}


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    """Rows of length about 2.4 in two shards a split, those of MASSIVE 500 times as long and with token 7."""
    splits = {}
    for number, split in enumerate(MASSIVE):
        acts = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number)) + 0.5
        acts[MASSIVE[split]] *= 500
        whole = torch.arange(ROWS, dtype=torch.int32)
        token = whole % 5
        token[MASSIVE[split]] = 7
        splits[split] = {"acts": acts, "token": token, "doc": whole // 10, "pos": whole}
    return ActivationStore.open(write_store(tmp_path, splits, 40))


def rows_of(store, split):
    return store.acts(split, torch.arange(store.n_rows(split)))


def test_a_store_is_parted_into_ordinary_and_massive_rows(store):
    ordinary, massive = store.parted(norm_limit(store, 10))
    for split, places in MASSIVE.items():
        others = torch.tensor([row for row in range(ROWS) if row not in places])
        assert (ordinary.n_rows(split), massive.n_rows(split)) == (len(others), len(places))
        for view in (ordinary, ResidentStore(ordinary)):
            assert torch.equal(rows_of(view, split), store.acts(split, others))
            assert torch.equal(view.column(split, "pos"), others.int())
        assert massive.column(split, "pos").tolist() == places
        assert torch.equal(rows_of(massive, split), store.acts(split, torch.tensor(places, dtype=torch.int64)))
    mean, spread = ordinary.moments("train")
    acts = rows_of(ordinary, "train").double()
    assert torch.allclose(mean, acts.mean(0))
    assert spread == pytest.approx(float((acts - acts.mean(0)).square().sum(1).mean()))
    with pytest.raises(ValueError, match="allowed: 0 to 56"):
        ordinary.acts("train", torch.tensor([57]))
    assert store.parted(1e9)[0] is store
    assert store.parted(1e9)[1].n_rows("test") == 0


def test_training_never_sees_a_massive_row_and_every_other_row_once_an_epoch(store):
    ordinary = store.parted(norm_limit(store, 10))[0]
    for view in (ordinary, ResidentStore(ordinary)):
        stream = RowStream(view, "train", 19, seed=3, window_rows=40)
        epoch = torch.cat([stream.next() for _ in range(3)])
        assert epoch.norm(dim=1).max() < 10
        assert torch.equal(epoch.sort(0).values, rows_of(ordinary, "train").sort(0).values)


def test_norms_say_how_many_they_are_and_what_they_hold(store):
    norms = describe_norms(store, 10.0, str)
    acts = rows_of(store, "train").double()
    kept = torch.tensor([row not in MASSIVE["train"] for row in range(ROWS)])
    deviation = (acts - acts[kept].mean(0)).square().sum(1)
    train = norms["splits"]["train"]
    assert (train["rows"], train["massive"], train["tokens"]) == (ROWS, 3, [["7", 3]])
    assert train["share_of_squared_deviation"] == pytest.approx(float(deviation[~kept].sum() / deviation.sum()))
    assert train["largest_norm"] == pytest.approx(float(acts.norm(dim=1).max()))
    assert norms["splits"]["val"] | {"largest_norm": 0} == {
        "rows": ROWS, "massive": 0, "largest_norm": 0, "share_of_squared_deviation": 0.0, "tokens": [],
    }  # fmt: skip
    lines = massive_warnings(norms)
    assert len(lines) == 2
    assert "3 of 60 train rows" in lines[0]
    assert "left out of training and of pooled metrics; tokens: '7' (3)" in lines[0]
    unlimited = describe_norms(store, None, str)
    assert unlimited["splits"] == norms["splits"]
    assert "not left out (data.max_norm_multiple: null)" in massive_warnings(unlimited)[0]
    assert massive_warnings(describe_norms(store, 1000.0, str)) == []


def test_ev_without_massive_rows_with_them_and_over_rows(store):
    ordinary, massive = store.parted(norm_limit(store, 10))
    mean = ordinary.moments("train")[0]
    found = evaluate_reconstruction(
        FakeSAE(WIDTH, scale=0.5), ordinary, "test", mean, massive=massive, batch_size=7
    ).metrics
    acts = rows_of(store, "test").double()
    sse, sst = (acts / 2).square().sum(1), (acts - mean).square().sum(1)
    kept = torch.tensor([row not in MASSIVE["test"] for row in range(ROWS)])
    expected = {
        "ev": 1 - sse[kept].sum() / sst[kept].sum(),
        "fvu": sse[kept].sum() / sst[kept].sum(),
        "ev_all_rows": 1 - sse.sum() / sst.sum(),
        "fvu_all_rows": sse.sum() / sst.sum(),
        "ev_row_mean": (1 - sse / sst).mean(),
    }
    assert {name: found[name].value for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert abs(found["ev"].value - found["ev_all_rows"].value) > 0.05
    whole = evaluate_reconstruction(FakeSAE(WIDTH, scale=0.5), store, "test", mean).metrics
    assert whole["ev"].value == whole["ev_all_rows"].value == pytest.approx(found["ev_all_rows"].value, rel=1e-6)


def test_ce_and_kl_with_massive_rows_spliced_and_left_as_they_are():
    lm, hook = tiny.language_model(), "model.layers.0"
    ids = torch.randint(1, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    ids[2, 4] = ids[4, 0] = 63  # position 0 is never edited
    lm.model.get_input_embeddings().weight.data[63] *= 1000
    acts = lm.capture(ids, hook).acts
    limit = 10 * float(acts.norm(dim=-1).median())
    assert (acts.norm(dim=-1) > limit).sum() == 2
    mean = acts[:2].mean((0, 1))
    sae = FakeSAE(tiny.WIDTH, scale=-0.5)

    def by_hand(edit, spare):
        def edited(acts_BTd):
            out = edit(acts_BTd)
            out[:, 0] = acts_BTd[:, 0]
            if spare:
                out[2, 4] = acts_BTd[2, 4]
            return out

        log_p = lm.run_with_edit(ids, hook, edited).log_softmax(-1)[:, 1:-1]
        return float(-log_p.gather(-1, ids[:, 2:, None]).mean()), log_p

    found = evaluate_language_model({"m": sae}, lm, hook, ids, mean, norm_limit=limit, batch_size=2)["m"].metrics
    clean, clean_log_p = by_hand(torch.clone, False)
    for suffix, spare in (("", False), ("_massive_kept", True)):
        spliced, log_p = by_hand(lambda acts: -0.5 * acts, spare)
        ablated, _ = by_hand(lambda acts: mean.expand_as(acts).clone(), spare)
        assert found[f"delta_ce{suffix}"].value == pytest.approx(spliced - clean, rel=1e-3, abs=1e-5)
        recovered = (ablated - spliced) / (ablated - clean)
        if ablated > clean:
            assert found[f"ce_recovered{suffix}"].value == pytest.approx(recovered, rel=1e-3)
        kl = (clean_log_p.exp() * (clean_log_p - log_p)).sum(-1).mean()
        assert found[f"kl{suffix}"].value == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert found["kl"].value != pytest.approx(found["kl_massive_kept"].value, rel=1e-2)
    without = evaluate_language_model({"m": sae}, lm, hook, ids, mean, batch_size=2)["m"].metrics
    assert without["kl_massive_kept"].value == without["kl"].value == found["kl"].value


@pytest.fixture(scope="module")
def massive_run(tmp_path_factory):
    """A smoke run on a copy of the packaged model in which one rare token is written 3,000 times as large."""
    folder = tmp_path_factory.mktemp("massive")
    model = shutil.copytree(tiny.PACKAGED_TOKENIZER, folder / "model")
    weights = load_file(model / "model.safetensors")
    name = next(key for key in weights if key.endswith("embed_tokens.weight"))
    tokens = read_tensors(tiny.PACKAGED_TOKENS)[0]["tokens"][:6000]
    ids, counts = tokens.unique(return_counts=True)
    rare = int(ids[(counts >= 20) & (counts <= 40)][0])
    weights[name][rare] *= 3000
    if "lm_head.weight" not in weights:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        weights["lm_head.weight"] = load_file(tiny.PACKAGED_TOKENIZER / "model.safetensors")[name].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    arms = [{"name": "baseline"}, {"name": "batch", "kind": "batchtopk"}]
    out = folder / "run"
    options = [f"model.name={model}", "model.hook=layers.0", "run.threads=1", f"arms={json.dumps(arms)}"]
    answer = hsae("run", "smoke", "--out", out, *(word for option in options for word in ("--set", option)))
    assert answer.code == 0, answer.err
    return out, answer, rare


def test_a_run_on_a_model_with_massive_rows(massive_run):
    out, answer, rare = massive_run
    norms = read_json(out / "phase1/norms.json")
    train = norms["splits"]["train"]
    store = ActivationStore.open(out / "activations")
    is_rare = store.column("train", "token") == rare
    assert train["massive"] == int(is_rare.sum()) > 0
    assert train["share_of_squared_deviation"] > 0.5
    assert answer.out.count("phase 1: warning: ") == sum(found["massive"] > 0 for found in norms["splits"].values())
    saved = load_file(out / "phase2/baseline/model/model.safetensors")
    ordinary = store.parted(norm_limit(store, 10))[0]
    mean, spread = ordinary.moments("train")
    assert torch.allclose(saved["data_mean"], mean.float())
    assert float(saved["data_scale"]) == pytest.approx((spread / store.width) ** 0.5, rel=1e-6)
    metrics = read_json(out / "phase4/results.json")["arms"]["batch"]
    assert metrics["ev"]["value"] != pytest.approx(metrics["ev_all_rows"]["value"], abs=1e-3)
