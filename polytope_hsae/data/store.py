"""The activation store: safetensors shards with label columns, read memory-mapped.

A folder holds `manifest.json` and shards `train-00000.safetensors`, `val-…`, `test-…`. Columns, one row per
token: `acts` [N,d] (the manifest's dtype), `token`, `next_token` (-1 at a context's end), `doc`, `pos`
(place in the document, 0 = its first token), `belief_concept` (child row or -1), `belief_token` (all int32),
`belief_prob` and `norm` (the row's length as stored; float32).
Shapes: N rows of a split, n or b rows asked for, d residual width.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from polytope_hsae.fileio import check_tensors, read_json, read_tensors, sha256_file

MANIFEST = "manifest.json"
FORMAT: Literal[2] = 2  # 1 had no norms
LABELS = {
    **dict.fromkeys(("token", "next_token", "doc", "pos", "belief_concept", "belief_token"), torch.int32),
    **dict.fromkeys(("belief_prob", "norm"), torch.float32),
}
Split = Literal["train", "val", "test"]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Shard(TypedDict):
    """An entry of the manifest; `file` lies in the store's folder."""

    file: Annotated[str, Field(pattern=r"^(train|val|test)-[0-9]+\.safetensors$")]
    split: Split
    rows: Count
    bytes: Count
    sha256: str


class Manifest(TypedDict):
    """What is read of manifest.json; a harvest writes more (docs/design.md, Artifacts)."""

    format: Literal[2]
    dtype: Literal["float32", "bfloat16", "float16"]
    rows: dict[Split, Count]
    width: Count
    complete: bool
    shards: list[Shard]


class ActivationStore:
    """A complete harvest, opened for reading. Make one with `ActivationStore.open(folder)`."""

    device = torch.device("cpu")  # where `acts` gives its rows

    def __init__(self, folder: Path, manifest: Manifest, kept: Mapping[str, Tensor] | None = None) -> None:
        """`kept`: ascending row numbers (int64) of the rows of every split that this view shows; None: all."""
        self.folder, self.manifest, self.kept = folder, manifest, kept
        self.width = manifest["width"]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._files: dict[str, list[str]] = {}
        self._stored_bounds: dict[str, np.ndarray] = {}  # of the shards' rows
        self._bounds: dict[str, np.ndarray] = {}  # of those that are kept
        self._acts: dict[str, Tensor] = {}
        self._columns: dict[tuple[str, str], Tensor] = {}
        for split in manifest["rows"]:
            shards = [shard for shard in manifest["shards"] if shard["split"] == split]
            self._files[split] = [shard["file"] for shard in shards]
            bounds = self._stored_bounds[split] = np.cumsum([0] + [shard["rows"] for shard in shards])
            self._bounds[split] = bounds if kept is None else np.searchsorted(kept[split].numpy(), bounds)

    def parted(self, limit: float) -> tuple["ActivationStore", "ActivationStore"]:
        """Two views of a whole store: the rows whose norm is at most `limit`, and the others."""
        assert self.kept is None
        ordinary = {split: self.column(split, "norm") <= limit for split in self._files}
        below, above = (
            {split: (rows_N == wanted).nonzero().squeeze(1) for split, rows_N in ordinary.items()}
            for wanted in (True, False)
        )
        whole = not any(map(len, above.values()))
        massive = ActivationStore(self.folder, self.manifest, above)
        return self if whole else ActivationStore(self.folder, self.manifest, below), massive

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = False) -> "ActivationStore":
        """Open a folder. `verify` compares every shard's sha256 with the manifest's.

        Raises ValueError for a missing or incomplete harvest and, naming the file, for a missing, truncated
        or (with `verify`) altered shard, or one with other columns than the manifest says.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise ValueError(f"{folder}: the harvest is not complete, run it again to finish it")
        rows: Counter[str] = Counter()
        for shard in manifest["shards"]:
            rows[shard["split"]] += shard["rows"]
        if rows != manifest["rows"] or min(rows.values(), default=0) == 0:
            raise ValueError(f"{folder / MANIFEST}: rows: found {manifest['rows']}, allowed: the shards' {dict(rows)}")
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                raise ValueError(f"{path}: missing shard")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path}: found {path.stat().st_size} bytes, the manifest has {shard['bytes']}")
            if verify and sha256_file(path) != shard["sha256"]:
                raise ValueError(f"{path}: sha256 differs from the manifest's, the shard is corrupt")
            _check_columns(path, manifest, shard["rows"])
        return cls(folder, manifest)

    def n_rows(self, split: str) -> int:
        return int(self._bounds[self._checked(split)][-1])

    def n_bytes(self, split: str) -> int:
        """Bytes of a split's activations."""
        return self.n_rows(split) * self.width * self.dtype.itemsize

    def shard_bounds(self, split: str) -> list[int]:
        """First row of every shard of a split, and the split's number of rows at the end."""
        return self._bounds[self._checked(split)].tolist()

    def column(self, split: str, name: str) -> Tensor:
        """A label column of the whole split, [N]; kept in memory once read."""
        if name not in LABELS:
            raise ValueError(f"column: found {name!r}, allowed: {', '.join(LABELS)}")
        files = self._files[self._checked(split)]
        if (split, name) not in self._columns:
            whole_N = torch.cat([self._read(file, name) for file in files])
            self._columns[split, name] = whole_N if self.kept is None else whole_N[self.kept[split]]
        return self._columns[split, name]

    def acts(self, split: str, indices: Tensor) -> Tensor:
        """Activations of the given rows, float32 [n,d], in the order asked for. Raises ValueError when out of range."""
        return self.stored(split, indices).float()

    def stored(self, split: str, indices: Tensor, *, pinned: bool = False) -> Tensor:
        """As `acts`, in the manifest's dtype; `pinned`: in memory that a GPU copies without the host's help."""
        bounds = self._bounds[self._checked(split)]
        index_n = indices.to("cpu", torch.int64)
        if index_n.numel() and (int(index_n.min()) < 0 or int(index_n.max()) >= bounds[-1]):
            raise ValueError(
                f"rows: found {int(index_n.min())} to {int(index_n.max())}, allowed: 0 to {bounds[-1] - 1}"
            )
        if self.kept is not None:
            index_n = self.kept[split][index_n]
        bounds = self._stored_bounds[split]
        sorted_n, order_n = index_n.sort()  # so every shard is read once, from its beginning to its end
        edges = torch.searchsorted(sorted_n, torch.from_numpy(bounds)).tolist()
        sorted_nd = torch.empty(index_n.numel(), self.width, dtype=self.dtype)
        for file, start, (first, last) in zip(self._files[split], bounds, pairwise(edges), strict=False):
            if first < last:
                torch.index_select(self._mapped(file), 0, sorted_n[first:last] - int(start), out=sorted_nd[first:last])
        acts_nd = torch.empty(sorted_nd.shape, dtype=self.dtype, pin_memory=pinned)
        return torch.index_select(sorted_nd, 0, order_n.argsort(), out=acts_nd)

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, int]]:
        """The split's rows in order: (acts float32 [b,d], number of the first row), b = `batch_size` but at the end."""
        if batch_size < 1:
            raise ValueError(f"batch_size: found {batch_size}, allowed: 1 or more")
        n_rows = self.n_rows(split)
        for start in range(0, n_rows, batch_size):
            yield self.acts(split, torch.arange(start, min(start + batch_size, n_rows))), start

    def moments(self, split: str, batch_size: int = 8192) -> tuple[Tensor, float]:
        """Mean of the rows (float64 [d]) and their mean squared distance from it, in one pass."""
        mean_d = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        summed, count = 0.0, 0
        for acts_bd, _ in self.batches(split, batch_size):
            acts_bd = acts_bd.double()
            batch_mean_d, rows = acts_bd.mean(0), acts_bd.shape[0]
            shift_d = batch_mean_d - mean_d
            summed += float((acts_bd - batch_mean_d).square().sum())
            summed += float(shift_d.square().sum()) * count * rows / (count + rows)
            mean_d += shift_d * rows / (count + rows)
            count += rows
        return mean_d.cpu(), summed / count

    def _checked(self, split: str) -> str:
        if split not in self._bounds:
            raise ValueError(f"split: found {split!r}, allowed: {', '.join(self._bounds)}")
        return split

    def _mapped(self, file: str) -> Tensor:
        """A shard's activations, mapped and not read until rows are taken."""
        if file not in self._acts:
            self._acts[file] = self._read(file, "acts")
        return self._acts[file]

    def _read(self, file: str, name: str) -> Tensor:
        return read_tensors(self.folder / file)[0][name]


class ResidentStore(ActivationStore):
    """A store whose activations lie on a device in the stored dtype. A split is loaded when it is first asked for."""

    def __init__(self, store: ActivationStore, device: str | torch.device = "cpu") -> None:
        super().__init__(store.folder, store.manifest, store.kept)
        self.device = torch.device(device)
        self._resident: dict[str, Tensor] = {}

    def stored(self, split: str, indices: Tensor, *, pinned: bool = False) -> Tensor:
        """Rows [n,d] on the device, in the order asked for and never pinned; the device itself checks the range."""
        if split not in self._resident:
            self._resident[split] = self._load(split)
        return self._resident[split].index_select(0, indices.to(self.device))

    def _load(self, split: str) -> Tensor:
        acts_Nd = torch.empty(self.n_rows(split), self.width, dtype=self.dtype, device=self.device)
        for first, last in pairwise(self.shard_bounds(split)):
            acts_Nd[first:last] = super().stored(split, torch.arange(first, last)).to(self.device)
        return acts_Nd


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a harvest, complete or not. Raises ValueError when there is none or it has another layout."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, not an activation store")
    manifest: Manifest = read_json(folder / MANIFEST, Manifest)
    return manifest


def _check_columns(path: Path, manifest: Manifest, rows: int) -> None:
    """Raise ValueError unless a shard has the columns that it should have; their numbers are not read."""
    tensors, _ = read_tensors(path)
    stored = getattr(torch, manifest["dtype"])
    labels = {name: ([dtype], [rows]) for name, dtype in LABELS.items()}
    check_tensors(path, tensors, {"acts": ([stored], [rows, manifest["width"]]), **labels}, finite=False)
