"""What a report is made from: the JSON files of a finished run folder (docs/design.md, Artifacts)."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..fileio import read_json
from ..parsing import parse_json
from ..provenance import State
from ..records import Ablations, Evidence, Interventions, Norms, Results, Steering, Train

KINDS: dict[str, Any] = {
    "evidence": Evidence,
    "results": Results,
    "steering": Steering,
    "interventions": Interventions,
    "ablations": Ablations,
}
PHASE_FILES = {1: ("concepts", "evidence"), 4: ("results", "steering", "interventions", "ablations", "latents")}


@dataclass(frozen=True)
class RunFiles:
    """The parsed files of one finished run; `train` holds every arm's train.json by name, in the config's order.

    `store` is the manifest of the activations, None where they were deleted; `norms` is None in runs of earlier
    versions.
    """

    config: Config
    config_text: str
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    train: dict[str, Any]
    concepts: dict[str, Any]
    evidence: dict[str, Any]
    results: dict[str, Any]
    steering: dict[str, Any]
    interventions: dict[str, Any]
    ablations: dict[str, Any]
    latents: dict[str, Any]
    store: dict[str, Any] | None
    norms: dict[str, Any] | None

    def metric(self, arm: str, name: str) -> dict[str, Any] | None:
        """{value, ci95, chance, n} of one arm; None where the run has no such arm or metric, or no value of it."""
        found = self.results["arms"].get(arm, {}).get(name)
        return None if found is None or found["value"] is None else found

    def lead(self, arm: str, name: str) -> dict[str, Any] | None:
        """The teacher minus the arm, on the same resamples; None where that has no value."""
        found = self.ablations["against_teacher"].get(arm, {}).get(name)
        return None if found is None or found["value"] is None else found

    def target(self, name: str) -> dict[str, Any]:
        """One of the five targets of results.json."""
        return next(target for target in self.results["targets"] if target["name"] == name)

    def parent_name(self, row: int) -> str:
        """Name of a parent concept."""
        return str(self.concepts["parents"][row]["name"])

    @cached_property
    def in_use(self) -> list[dict[str, Any]]:
        """The concepts that purity and leakage are measured on: {parent, rows, ...}, the same in every arm."""
        return next(iter(self.ablations["concepts"].values()))

    @cached_property
    def arms(self) -> list[str]:
        """The measured arms in the config's order, in which everything shows them."""
        return [arm.name for arm in self.config.arms if arm.name in self.results["arms"]]

    @cached_property
    def permuted(self) -> str | None:
        """The first arm that starts from a teacher of the wrong words, if there is one."""
        return next((arm for arm in self.arms if self.config.arm(arm).init == "permuted_teacher"), None)

    @cached_property
    def judged(self) -> list[str]:
        """The arms that the targets compare, as far as they were measured."""
        return [arm for arm in self.arms if arm in ("baseline", "teacher")]

    @cached_property
    def key_arms(self) -> list[str]:
        """The judged arms, the control and the flat arms; without any of them the first arm."""
        flat = [arm for arm in self.arms if self.config.arm(arm).kind != "hsae"]
        return [arm for arm in self.arms if arm in (*self.judged, self.permuted, *flat)] or self.arms[:1]

    @cached_property
    def leaves_rows_out(self) -> bool:
        """Whether rows of massive norm are left out of metrics that do not name them."""
        return bool(self.norms and self.norms["limit"] and any(one["massive"] for one in self.norms["splits"].values()))

    @cached_property
    def has_hierarchy(self) -> bool:
        """Whether any parent's children share a direction (z > 3)."""
        return bool(self.evidence["main"]["fraction_z_above_3"])


def read_run(folder: Path) -> RunFiles:
    """Read the files of a finished run.

    Raises ValueError (one line) when phase 4 is not finished, or one of the files is missing or is not JSON.
    """
    again = "finish the run first (hsae run)"
    for name in ("config.yaml", "provenance.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: found no {name}, allowed: the folder of a finished run; {again}")
    provenance = read_json(folder / "provenance.json", State)
    if "phase4" not in provenance["phases"]:
        raise ValueError(f"{folder}: phase 4 is not finished; {again}")
    config = load_config(str(folder / "config.yaml"))
    paths = {name: folder / f"phase{phase}" / f"{name}.json" for phase, names in PHASE_FILES.items() for name in names}
    trained = {arm.name: folder / f"phase{arm.phase}" / arm.name / "train.json" for arm in config.arms}
    for path in (*paths.values(), *trained.values()):
        if not path.is_file():
            raise ValueError(f"{path}: missing, so the run is not finished; {again}")
    manifest, norms = folder / "activations" / "manifest.json", folder / "phase1" / "norms.json"
    files = {name: read_json(path, KINDS.get(name, dict)) for name, path in paths.items()}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return RunFiles(
        config=config,
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        provenance=provenance,
        metrics=[parse_json(line) for line in lines],
        train={name: read_json(path, Train) for name, path in trained.items()},
        store=read_json(manifest) if manifest.is_file() else None,
        norms=read_json(norms, Norms) if norms.is_file() else None,
        **files,
    )
