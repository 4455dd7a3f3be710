"""JSON and YAML text from anywhere into plain values; what does not fit is a ValueError of one line.

It imports no PyTorch: the command line reads its config with it.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

MAX_DEPTH = 32  # of nested YAML
SHOWN = 100  # characters of a value in an error


def parse_json(text: str) -> Any:
    """JSON without NaN, infinities, repeated keys and text that cannot be written as UTF-8.

    Raises ValueError saying what is wrong; the caller names the file.
    """
    try:
        obj = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_no_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(obj, ensure_ascii=False).encode("utf-8")  # one half of a surrogate pair alone is no text
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return obj


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} appears twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(cut(digits))


def parse_yaml(text: str) -> Any:
    """YAML without repeated keys (one value would be lost), aliases and tags; dates are text.

    Raises ValueError saying what is wrong; the caller names the file.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with fewer features: a few aliases of aliases could stand for billions of values."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="found an alias or a tag, allowed: neither", problem_mark=event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"found more than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        node.value.encode("utf-8")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"found the key {shown(key.value)} twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def checked(obj: Any, kind: Any, where: object) -> Any:
    """`obj`, unchanged, if it is a `kind`: any type that pydantic checks. Nothing is converted; more keys may be there.

    Raises ValueError naming `where` and the first field that does not fit.
    """
    try:
        _adapter(kind).validate_python(obj, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {misfit(error)}") from error
    return obj


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # slow to make


def misfit(error: ValidationError) -> str:
    """The first problem that pydantic found: field, found, allowed."""
    problem = error.errors()[0]
    field = place(problem)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        line = f"{field}.{message}" if field else message
    else:
        missing = problem["type"] == "missing"
        found = "nothing" if missing else shown(problem["input"])
        allowed = "a value" if missing else f"{message[0].lower()}{message[1:]}"
        line = f"{field}: found {found}, allowed: {allowed}".removeprefix(": ")
    return " ".join(line.split())


def place(problem: Mapping[str, Any]) -> str:
    """The field of one of pydantic's problems, as a path."""
    return cut(".".join(str(part) for part in problem["loc"]))


def shown(value: Any) -> str:
    """`value` for an error: its repr, cut to SHOWN characters."""
    try:
        return cut(repr(value))
    except ValueError:
        return "a number of thousands of digits"  # Python prints none of more than 4300


def did_you_mean(found: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: the name that is most like it; nothing where none is."""
    close = difflib.get_close_matches(found, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def cut(text: str) -> str:
    """`text` for an error: printable, and at most SHOWN characters."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
