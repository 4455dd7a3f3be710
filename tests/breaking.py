"""Hypothesis strategies that break valid files: bytes, trees of JSON or YAML, and tensors."""

import copy
import json
import math
import os
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

settings.register_profile(
    "ci", max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=10_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool,
    torch.uint8, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, 1e-400, 1e308, math.inf, -math.inf, math.nan]
)
TEXTS = st.sampled_from(
    ["", " ", "a/b", "..", "../x", "/", "a\nb", "\0", "\ud800", "é", "[/red]", "null", "1e400", "x" * 300, "true"]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.integers(), TEXTS, st.text(max_size=5))
ODD = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@st.composite
def broken_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Random bytes, or `whole` with bits flipped, a piece cut out, put in, doubled, or everything after it gone."""
    kind = draw(st.sampled_from(["random", "flip", "cut", "insert", "double", "truncate"]))
    if kind == "random":
        return draw(st.binary(max_size=200))
    first = draw(st.integers(0, len(whole)))
    last = draw(st.integers(first, min(len(whole), first + 40)))
    if kind == "flip":
        broken = bytearray(whole)
        for place in draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
            broken[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(broken)
    middle = {"cut": b"", "insert": draw(st.binary(max_size=20)) + whole[first:last], "double": 2 * whole[first:last]}
    return whole[:first] + (b"" if kind == "truncate" else middle[kind] + whole[last:])


@st.composite
def broken_tree(draw: st.DrawFn, whole: Any) -> Any:
    """`whole` with one to three places replaced by something odd, deleted, doubled or joined by something more."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        node, places = tree, _places(tree)
        while places:
            place = draw(st.sampled_from(places))
            inner = _places(node[place])
            if not inner or draw(st.integers(0, 4)) == 0:
                break
            node, places = node[place], inner
        if not places:
            return draw(ODD)
        kind = draw(st.sampled_from(["replace", "replace", "delete", "add", "copy"]))
        if kind == "replace":
            near = {int: NUMBERS, float: NUMBERS, str: TEXTS}.get(type(node[place]), ODD)
            node[place] = draw(near | near | ODD)
        elif kind == "delete":
            del node[place]
        elif kind == "copy":
            node[place] = copy.deepcopy(node[draw(st.sampled_from(places))])
        elif isinstance(node, list):
            node.insert(place, draw(ODD))
        else:
            node[draw(TEXTS)] = draw(ODD)
    return tree


def _places(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def broken_json(whole: bytes) -> st.SearchStrategy[bytes]:
    """A broken JSON file: as a tree (NaN and huge numbers included) or as bytes."""
    trees = broken_tree(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
    return trees | trees | broken_bytes(whole)


def broken_lines(whole: bytes) -> st.SearchStrategy[bytes]:
    """A broken file of JSON lines."""
    trees = broken_tree([json.loads(line) for line in whole.splitlines()])
    lines = trees.map(lambda tree: "".join(f"{json.dumps(line)}\n" for line in _items(tree)).encode())
    return lines | lines | broken_bytes(whole)


def _items(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


def broken_yaml(whole: bytes) -> st.SearchStrategy[bytes]:
    """A broken YAML file: as a tree, with odd words of YAML put in, or as bytes."""
    words = st.sampled_from(
        ["&a ", "*a", "!!int '' ", "!!python/name:os.system ", "? ", "- ", "\t", "{" * 99, "<<: ", "2001-13-45", "0b_",
         "1:60:" * 400 + "1.5", "'\\ud800'", '"\\ud800"', "%", "---\n", "a: 1\na: 2\n"]
    )  # fmt: skip
    places = st.integers(0, len(whole))
    trees = broken_tree(yaml.safe_load(whole)).map(lambda tree: yaml.safe_dump(tree).encode())
    inserted = st.builds(lambda word, place: whole[:place] + word.encode() + whole[place:], words, places)
    return trees | trees | inserted | broken_bytes(whole)


@st.composite
def _broken_tensors(draw: st.DrawFn, whole: dict[str, Tensor], about: dict[str, str]) -> bytes:
    tensors, metadata = dict(whole), dict(about)
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["drop", "rename", "add", "dtype", "shape", "value", "value", "metadata"]))
        name = draw(st.sampled_from(sorted(tensors) or ["new"]))
        tensor = tensors.get(name, torch.zeros(2))
        if kind == "drop":
            tensors.pop(name, None)
        elif kind == "rename":
            tensors[draw(st.sampled_from(["new", "a.b", "model.new", f"{name}."]))] = tensors.pop(name, tensor)
        elif kind == "add":
            added = draw(st.sampled_from(["new", "model.new", "optimizer.D.step"]))
            tensors[added] = torch.zeros(draw(st.integers(0, 2)))
        elif kind == "dtype":
            tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        elif kind == "shape":
            tensors[name] = draw(st.sampled_from(_reshaped(tensor))).contiguous()
        elif kind == "value" and tensor.numel():
            values = [math.nan, math.inf, 0, -1, 1e30] if tensor.dtype.is_floating_point else [0, -1, 1, 99]
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(values))
        elif kind == "metadata":
            key = draw(st.sampled_from([*sorted(metadata), "new"]))
            metadata[key] = draw(TEXTS.filter(lambda text: text != "\ud800") | ODD.map(json.dumps))
            if draw(st.booleans()):
                del metadata[key]
    return save(tensors, metadata)


def _reshaped(tensor: Tensor) -> list[Tensor]:
    changed = [tensor.unsqueeze(0), tensor.flatten(), tensor.unsqueeze(-1), tensor.repeat([2] * max(tensor.ndim, 1))]
    return changed + ([tensor[:0], tensor[1:], tensor[..., :-1]] if tensor.ndim else [])


def broken_tensors(whole: bytes) -> st.SearchStrategy[bytes]:
    """A broken safetensors file: tensors lost, added, of other types, shapes and values; or as bytes."""
    size = int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8 : 8 + size]).get("__metadata__", {})
    headers = broken_json(whole[8 : 8 + size])
    header = headers.map(lambda text: len(text).to_bytes(8, "little") + text + whole[8 + size :])
    tensors = _broken_tensors(load(whole), about)
    return tensors | tensors | tensors | header | broken_bytes(whole)
