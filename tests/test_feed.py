"""How rows reach a GPU: read ahead by a thread, or lying there. Only the copies themselves need one."""

import json
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import tiny
import torch
from running import script
from test_data import SETTINGS, documents
from trainers import KilledError, MemoryStore, assert_same_run, make_trainer, planted_rows, validation

from polytope_hsae.data.feed import AHEAD, Prefetch, feed, place
from polytope_hsae.data.harvest import harvest
from polytope_hsae.data.store import ResidentStore
from polytope_hsae.data.stream import RowStream
from polytope_hsae.tracking import JsonlTracker

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


class CountingStore(MemoryStore):
    """A store that counts what was read, and breaks at one batch."""

    def __init__(self, rows, breaks_at=None):
        super().__init__(rows)
        self.breaks_at, self.n_read = breaks_at, 0

    def acts(self, split, indices):
        if self.n_read == self.breaks_at:
            raise ValueError("a shard is gone")
        self.n_read += 1
        return super().acts(split, indices)


def stream(breaks_at=None):
    return RowStream(CountingStore(planted_rows(), breaks_at), "train", 16, seed=3, window_rows=80)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A harvest in bfloat16."""
    folder = tmp_path_factory.mktemp("store")
    return harvest(tiny.language_model("llama"), documents(), None, folder, **SETTINGS, dtype="bfloat16")


@pytest.fixture
def prefetch():
    """Makes Prefetch objects, and closes them at the end."""
    made = []

    def make(of):
        made.append(Prefetch(of, CPU))
        return made[-1]

    yield make
    for each in made:
        each.close()


def reading():
    """Threads that read ahead."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_read_ahead_are_those_of_the_stream(prefetch):
    plain, ahead = stream(), prefetch(stream())
    for _ in range(25):  # more than two epochs
        assert torch.equal(ahead.next(), plain.next())
        assert ahead.state_dict() == plain.state_dict()
    wait(ahead._pending)
    assert ahead.stream.store.n_read == 25 + AHEAD
    assert ahead.stream.state_dict() != plain.state_dict()


def test_reading_ahead_goes_on_exactly_where_it_stopped(prefetch):
    plain = stream()
    expected = [plain.next() for _ in range(25)]
    for stop in (0, 1, 9, 10):
        before, after = prefetch(stream()), prefetch(stream())
        for _ in range(stop):
            before.next()
        state = json.loads(json.dumps(before.state_dict()))
        after.next()  # what it has read by now is dropped
        for resumed in (after, before):
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert all(torch.equal(resumed.next(), batch) for batch in expected[stop:])
    with pytest.raises(ValueError, match=r"stream.seed: the checkpoint has 4, this stream has 3"):
        after.load_state_dict({**state, "seed": 4})


def test_a_killed_run_that_reads_ahead_equals_a_plain_one(tmp_path):
    def run(folder, read_ahead, kill_at=None):
        trainer = make_trainer(folder, evaluate=validation, accumulate=2)

        def on_step(step, total):
            if step == kill_at:
                raise KilledError

        with feed(trainer.stream, "meta" if read_ahead else "cpu") as trainer.stream:
            trainer.resume()
            tracker = JsonlTracker(folder / "metrics.jsonl", 2, "arm", 0, trainer.step)
            try:
                trainer.final = trainer.fit(tracker, on_step)
            finally:
                tracker.close()
        return trainer

    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    with pytest.raises(KilledError):
        run(ahead, True, kill_at=20)
    assert reading() == []
    assert_same_run(run(plain, False), run(ahead, True), plain, ahead)
    assert reading() == []


def test_an_error_in_the_thread_is_raised_where_its_batch_was_due(prefetch):
    plain, ahead = stream(), prefetch(stream(breaks_at=4))
    for _ in range(4):
        assert torch.equal(ahead.next(), plain.next())
    with pytest.raises(ValueError, match="a shard is gone"):
        ahead.next()
    assert ahead.state_dict() == plain.state_dict()
    assert len(reading()) == 1
    ahead.close()
    assert reading() == []


def test_only_rows_that_have_to_come_to_the_device_are_read_ahead():
    plain = stream()
    with feed(plain, "cpu") as found:
        assert found is plain
    with feed(plain, "meta") as found:
        assert isinstance(found, Prefetch)


def test_the_store_is_chosen_by_the_free_memory(store, monkeypatch):
    assert place(store, "cpu", 0) is store
    needed = store.n_bytes("train") + store.n_bytes("val")
    assert needed == (store.n_rows("train") + store.n_rows("val")) * store.width * 2  # bfloat16
    for free, reserved, fits in (
        (2 * needed + 10, 10, True), (2 * needed + 9, 10, False), (2 * needed, 0, True), (9, 20, False),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        chosen = place(store, "cuda", reserved)
        assert (chosen is not store) == fits == isinstance(chosen, ResidentStore)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * needed, 10 * needed))
    assert place(store, "cuda", 0).device == torch.device("cuda")


def test_a_resident_store_gives_the_same_batches(store):
    plain = RowStream(store, "train", 16, 7, window_rows=130)
    resident = RowStream(ResidentStore(store, "cpu"), "train", 16, 7, window_rows=130)
    for _ in range(2 * store.n_rows("train") // 16 + 1):
        assert torch.equal(resident.next(), plain.next())
    assert resident.state_dict() == plain.state_dict()
    rows = torch.tensor([5, 0, 5])
    assert store.stored("train", rows).dtype == resident.store.stored("train", rows).dtype == torch.bfloat16


def test_the_loader_script_times_every_way(tmp_path):
    command = ROOT / "benchmarks/loader.py", "--out", tmp_path, "--shape", "smoke", "--rows", 3000, "--steps", 1
    answer = script(*command, "--device", "cpu")
    assert answer.code == 0, answer.err
    times = json.loads((tmp_path / "loader.json").read_text())["ms_per_step"]
    assert len(times) == 8
    assert all(ms > 0 for ms in times.values())
    assert reading() == []
