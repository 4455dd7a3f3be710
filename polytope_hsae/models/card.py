"""What a saved model says of itself: card.json beside its config, and what follows from it.

What needs a language model is imported where it is used: Transformers takes seconds to load.
A unit is a parent (a flat model's latent), by its number, or a child, by its parent's number and its own.
Shapes: d residual width.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ..fileio import json_text, read_json, update_text
from ..geometry.causal import CausalGeometry
from ..records import Metric

if TYPE_CHECKING:
    from ..data.vocabulary import Words
    from ..lm import LanguageModel

FILE = "card.json"

Unit = int | tuple[int, int]


class Slot(TypedDict):
    """A child of a model that a teacher put a concept into: its number and the concept, with evidence of phase 1."""

    child: Annotated[int, Field(ge=0)]
    concept: str
    evidence: dict[str, float | None]


class ParentSlot(TypedDict):
    """The same for a parent, and for its children."""

    parent: Annotated[int, Field(ge=0)]
    concept: str
    evidence: dict[str, float | None]
    children: list[Slot]


class Mapped(TypedDict):
    """The parent that a concept was mapped to on held-out words, and how well it reads it."""

    parent: Annotated[int, Field(ge=0)]
    concept: str
    purity: float | None
    leakage: float | None
    recall: float | None


class Card(TypedDict):
    """card.json. `row_norm`: median norm of the train rows at the hook; `geometry`: the metric of words.

    `slots` is what a teacher put in, empty without one; `mapped`, `split` and `metrics` are null until phase 4.
    """

    model: str
    revision: str | None
    hook: str
    tokenizer_sha256: str
    arm: str
    row_norm: Annotated[float, Field(gt=0)]
    geometry: dict[str, Any]
    evidence_of: str
    slots: list[ParentSlot]
    mapped: list[Mapped] | None
    split: str | None
    metrics: dict[str, Metric] | None


class TopTokens(NamedTuple):
    """(text, score) of the tokens that a unit writes most, best first, and how they were found.

    None in place of the tokens where the language model's unembedding says nothing of them; `how` says why.
    """

    tokens: list[tuple[str, float]] | None
    how: str


def read_card(folder: Path) -> Card | None:
    """The card in a saved model's folder; None where it has none. Raises ValueError for a file that is no card."""
    path = folder / FILE
    return read_json(path, Card) if path.is_file() else None


def write_card(folder: Path, card: Card) -> None:
    """Write a card beside a saved model, unless just that is there."""
    update_text(folder / FILE, json_text(card))


class Described:
    """The part of an autoencoder that speaks of what its latents stand for. `card` is None where nothing is known."""

    card: Card | None = None
    width: int
    n_parents: int
    n_children: int

    def write_directions(self) -> Tensor:
        """The parents' write directions [P, d]."""
        raise NotImplementedError

    @property
    def names(self) -> dict[Unit, str]:
        """The concept of every unit that has one: mapped to it in phase 4, else put into it by a teacher."""
        if self.card is None:
            return {}
        found: dict[Unit, str] = {}
        for slot in self.card["slots"]:
            found[slot["parent"]] = slot["concept"]
            found |= {(slot["parent"], child["child"]): child["concept"] for child in slot["children"]}
        return found | {of["parent"]: of["concept"] for of in self.card["mapped"] or []}

    def direction(self, unit: Unit) -> Tensor:
        """What a unit writes, in raw coordinates, with norm 1: [d]. Raises ValueError for one that is not there."""
        parent, child = unit if isinstance(unit, tuple) else (unit, None)
        if not 0 <= parent < self.n_parents or (child is not None and not 0 <= child < self.n_children):
            children = f", or (parent, 0 to {self.n_children - 1})" if self.n_children else ""
            raise ValueError(f"unit: found {unit}, allowed: a parent, 0 to {self.n_parents - 1}{children}")
        if child is None:
            return self.write_directions()[parent]
        atom_d: Tensor = self.atoms(parent)[child].detach()  # type: ignore[attr-defined]  # only an H-SAE has children
        return torch.nn.functional.normalize(atom_d, dim=0)

    def top_tokens(self, lm: "LanguageModel", unit: Unit, n: int = 10) -> TopTokens:
        """The n tokens of the model that a unit raises most when it is on, as in latents.json.

        Raises ValueError without a card, which names the hook.
        """
        from ..data.vocabulary import TokenTexts, significant

        card, direction_d = self._card("top_tokens"), self.direction(unit)
        words, how = _words_of(lm, card, self.width)
        if words is None:
            return TopTokens(None, how)
        text = TokenTexts(lm.tokenizer)
        (best,) = words.top(direction_d[None].to(lm.device), n)
        return TopTokens([(text(token), significant(score)) for token, score in best], how)

    def steer(self, lm: "LanguageModel", unit: Unit, dose: float) -> AbstractContextManager[None]:
        """`with sae.steer(lm, unit, dose):` every pass of `lm.model` has the unit's direction added at the SAE's hook.

        dose: length of what is added, as a multiple of the median norm of the rows that the model was trained on; below
        0 it is taken off. Padding and every sequence's first token stay as they are (`lm.steering.added`), `generate`
        works with any batch and cache. Raises ValueError without a card, for an unknown unit and for another width.
        """
        from ..lm.steering import added

        card = self._card("steer")
        return added(lm, card["hook"], dose * card["row_norm"] * self.direction(unit))

    def _card(self, what: str) -> Card:
        if self.card is None:
            raise ValueError(f"{what}: found a model without {FILE}, allowed: one that hsae trained, or set its card")
        return self.card


_words: WeakKeyDictionary["LanguageModel", dict[Any, tuple["Words | None", str]]] = WeakKeyDictionary()


def _words_of(lm: "LanguageModel", card: Card, width: int) -> tuple["Words | None", str]:
    """As `written_words`, made once for a language model and a hook: a metric takes seconds on a large one."""
    from ..data.vocabulary import written_words

    options = card["geometry"]
    key = (card["hook"], width, *options.values())
    known = _words.setdefault(lm, {})
    if key not in known:
        rows_Vd = lm.unembedding[lm.named]
        geometry = CausalGeometry(rows_Vd, options["shrinkage"], options["metric"], seed=options["seed"])
        known[key] = written_words(lm, card["hook"], width, geometry)
    return known[key]
