"""`hsae doctor`: what is installed, what is broken, and what could be better.

Every check says what it found. Advice is given only where it follows from that. Nothing here needs PyTorch to work.
"""

import hashlib
import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from .config import PACKAGE, RunConfig
from .units import size

DISTRIBUTION = "polytope-hsae"
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}  # where they differ from the package's name
EXTRAS = {
    "data": "hub datasets and Parquet files",
    "wordnet": "concepts.wordnet: nltk",
    "wandb": "tracking.wandb",
    "tensorboard": "tracking.tensorboard",
}
QUICKSTART_MEMORY, QUICKSTART_DISK = 1.5e9, 0.7e9  # bytes; README.md and `du` of a finished run folder
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
BROKEN_IMPORT = (ImportError, OSError, RuntimeError, ValueError, AttributeError)  # what half an installation raises


@dataclass(frozen=True)
class Check:
    """One line: what was found under a name, whether the package cannot work with it, and what could be better."""

    name: str
    found: str
    advice: str | None = None
    broken: bool = False


def examine() -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [
        Check("python", f"{platform.python_version()}, {platform.platform()}"),
        *packages(),
        *extras(),
        cpu(),
        memory(),
        *accelerators(),
        disk(Path.cwd()),
        assets(PACKAGE / "assets"),
    ]


def packages() -> Iterator[Check]:
    """The package and what it requires: versions, and whether each can be imported."""
    own = _version(DISTRIBUTION)
    unchecked = None if own else f"what it requires is only known once it is installed: pip install {PACKAGE.parent}"
    yield Check(DISTRIBUTION, f"{own or 'not installed'}, in {PACKAGE}", unchecked)
    for requirement in _requirements():
        if not requirement.marker:
            yield dependency(requirement)


def dependency(requirement: Requirement) -> Check:
    """One required package: broken when it is missing or cannot be imported."""
    install = f"pip install {str(requirement)!r}"
    found = _version(requirement.name)
    if found is None:
        return Check(requirement.name, "missing", install, broken=True)
    try:
        importlib.import_module(IMPORT_NAMES.get(requirement.name, requirement.name))
    except BROKEN_IMPORT as error:
        reason = f"{found}, cannot be imported: {' '.join(str(error).split())}"
        return Check(requirement.name, reason, f"{install} --force-reinstall", broken=True)
    fits = requirement.specifier.contains(found, prereleases=True)
    return Check(requirement.name, found, None if fits else f"made for {requirement.specifier}: {install}")


def extras() -> Iterator[Check]:
    """The optional parts: which packages of each are there."""
    for extra, purpose in EXTRAS.items():
        members = [item for item in _requirements() if item.marker and item.marker.evaluate({"extra": extra})]
        found = {item.name: _version(item.name) for item in members}
        text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
        complete = all(found.values())
        advice = None if complete else f'for {purpose}: pip install "{DISTRIBUTION}[{extra}]"'
        yield Check(f"extra {extra}", text or "unknown", advice)


def cpu() -> Check:
    """Cores that this process may use, beside the threads that configs ask for unless told otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = RunConfig().threads
    advice = f"configs use {threads} threads: --set run.threads={cores} uses all cores and no more"
    return Check("cpu", f"{cores} cores", None if cores == threads else advice)


def memory(proc: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Check:
    """Main memory that is there and that is free, or less where a container has a limit; only Linux tells."""
    if not proc.is_file():
        return Check("memory", "unknown")
    rows = (line.split() for line in proc.read_text().splitlines())
    kilobytes = {row[0]: int(row[1]) for row in rows if row[1:]}
    total, free = 1024 * kilobytes["MemTotal:"], 1024 * kilobytes["MemAvailable:"]
    text = limit.read_text().strip() if limit.is_file() else "max"
    allowed = int(text) if text.isdecimal() else total
    found = f"{size(total)}, {size(free)} free" + (f", limited to {size(allowed)}" if allowed < total else "")
    short = min(free, allowed) < QUICKSTART_MEMORY
    return Check("memory", found, f"the quickstart takes {size(QUICKSTART_MEMORY)}" if short else None)


def accelerators() -> Iterator[Check]:
    """CUDA devices as PyTorch sees them, and Triton."""
    try:
        import torch
    except BROKEN_IMPORT:
        return  # the line of torch says so
    cuda = torch.cuda.is_available()
    if not cuda:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        question = f"there is an NVIDIA driver: is torch {torch.__version__} made for it"
        question += "?" if hidden is None else f", and CUDA_VISIBLE_DEVICES={hidden} right?"
        yield Check("cuda", "no device", question if NVIDIA_DRIVER.is_file() else None)
    for number in range(torch.cuda.device_count() if cuda else 0):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found = f"{device.name}, {size(total)}, {size(free)} free, capability {device.major}.{device.minor}"
        oldest = min(torch.cuda.get_arch_list(), key=_capability, default="sm_00")
        old = 10 * device.major + device.minor < _capability(oldest)
        advice = f"this build of torch begins at {oldest}: install one for older devices" if old else None
        yield Check(f"cuda:{number}", found, advice)
    triton = _version("triton")
    advice = "there is a CUDA device: pip install triton" if cuda and not triton else None
    yield Check("triton", triton or "not installed", advice)


def _capability(architecture: str) -> int:
    """90 of sm_90 or sm_90a."""
    return int("".join(filter(str.isdigit, architecture)))


def disk(folder: Path) -> Check:
    """Free space where run folders would go, and whether they can be written there."""
    usage = shutil.disk_usage(folder)
    advice = None
    if usage.free < QUICKSTART_DISK:
        advice = f"the quickstart's run folder takes {size(QUICKSTART_DISK)}: --out puts it elsewhere"
    if not os.access(folder, os.W_OK):
        advice = "this folder cannot be written: --out puts run folders elsewhere"
    return Check("disk", f"{size(usage.free)} free of {size(usage.total)} in {folder}", advice)


def assets(folder: Path) -> Check:
    """The packaged language model, tokens, nouns and verbs against the checksums in assets/SHA256SUMS."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    damaged = []
    for digest, name in (line.split() for line in lines):
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            damaged.append(name)
    if damaged:
        return Check("assets", f"damaged: {', '.join(damaged)}", "install the package again", broken=True)
    return Check("assets", f"{len(lines)} files, all as they were packaged")


def to_json(checks: list[Check]) -> dict[str, Any]:
    """{"ok", "checks": [{name, found, advice, broken}]}."""
    return {"ok": not any(check.broken for check in checks), "checks": [asdict(check) for check in checks]}


def format_checks(checks: list[Check]) -> str:
    """One line per check, and one below it for its advice."""
    width = max(len(check.name) for check in checks) + 2
    lines = []
    for check in checks:
        lines.append(f"{check.name:{width}}{check.found}")
        if check.advice is not None:
            lines.append(f"{'':{width}}{'broken: ' if check.broken else '-> '}{check.advice}")
    return "\n".join(lines)


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
