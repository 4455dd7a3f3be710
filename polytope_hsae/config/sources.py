"""Where a run's numbers come from: machine, language model, text, concepts, activations, geometry."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from .block import FOLDER_NAME, Block, Fraction, Whole, check_split, require

Source = Literal["tokens", "text", "jsonl", "parquet", "hub"]
ENDINGS: dict[str, tuple[str, ...]] = {
    "tokens": (".safetensors",),
    "text": (".txt", ".txt.xz", ".txt.gz"),
    "jsonl": (".jsonl", ".jsonl.xz", ".jsonl.gz"),
    "parquet": (".parquet",),
}  # of the files of each source
PACKAGED = "packaged"


class RunConfig(Block):
    name: str = Field("run", description="Name of the run; its folder is runs/NAME.", pattern=FOLDER_NAME)
    seed: Whole = Field(0, ge=0, description="Seed of the whole run.")
    device: str = Field("auto", description="auto (CUDA if there is one), cpu, cuda or cuda:N.")
    threads: int = Field(2, ge=1, le=1024, description="CPU threads. Another number rounds differently.")
    deterministic: bool = Field(True, description="Ask PyTorch for deterministic algorithms.")


class ModelConfig(Block):
    name: str = Field("textbook-lm-9m", description="Hugging Face id, folder, or the packaged textbook-lm-9m.")
    revision: str | None = Field(None, description="Hub revision: commit, tag or branch; null = the default branch.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the language model.")
    hook: str = Field(
        "final_residual_pre_unembed",
        description="Where activations are read: final_residual_pre_unembed (after the final norm), layers.N (block N; "
        "-1 = last), or a module, e.g. model.layers.2.",
    )

    @property
    def title(self) -> str:
        """What files call the model: its name, or of a folder the last part of its path."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name


class CorpusConfig(Block):
    source: Source | None = Field(None, description="Kind of corpus; null = by the file ending of path.")
    path: str | None = Field(None, description="File, folder, glob or hub dataset; null = the packaged tokens.")
    documents: Literal["packed", "blank", "line", "file"] = Field(
        "packed",
        description="What is one document in a text file: paragraphs packed up to one context, a block between blank "
        "lines, a line, or the file.",
    )
    text_field: str = Field("text", min_length=1, description="Field that holds the text (JSONL, Parquet, hub).")
    document_start: str = Field(
        "auto",
        description="Token before each document: auto (docs/method.md section 3), none, bos, eos, or a token's text.",
    )
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.80, 0.05, 0.15), description="Shares of documents for train, val and test; unused with heldout_path."
    )
    heldout_path: str | None = Field(
        None, description="Held-out files of the same kind, half val, half test; null = split path."
    )
    max_tokens: Whole = Field(600_000, ge=256, description="Maximum tokens to read.")
    heldout_tokens: Whole = Field(600_000, ge=256, description="Maximum tokens to read of heldout_path.")
    heldout_document_tokens: Whole | None = Field(
        None, ge=3, description="Maximum tokens of each val and test document, so that no book dominates; null = all."
    )
    context_length: Whole = Field(256, ge=8, description="Maximum tokens per context.")

    @property
    def kind(self) -> Source:
        """The source, which the ending of the path says where it is not given."""
        if self.source is not None or self.path is None:
            return self.source or "tokens"
        path = self.path
        found = next((source for source in get_args(Source) if path.endswith(ENDINGS.get(source, ()))), None)
        endings = ", ".join(ending for listed in ENDINGS.values() for ending in listed)
        allowed = f"a path that ends in {endings}, or a source: {', '.join(get_args(Source))}"
        if found is None:
            raise ValueError(f"source: found null with the path {path!r}, allowed: {allowed}")
        return found

    @model_validator(mode="after")
    def _one_kind(self) -> "CorpusConfig":
        of_text = self.kind == "text"
        require("documents", self.documents, of_text or self.documents == "packed", f"packed with source {self.kind}")
        return check_split(self)


class ConceptsConfig(Block):
    ontology: str = Field("wordnet", description="wordnet, or a YAML or JSON file {parent: {child: [words]}}.")
    parts_of_speech: list[Literal["noun", "verb"]] = Field(
        ["noun"],
        min_length=1,
        description="WordNet's words to use; a word that is both counts as the first. Also how a file's words inflect.",
    )
    wordnet: Literal["embedded", "nltk", "auto"] = Field(
        "embedded", description="Packaged WordNet 3.0, nltk's (extra wordnet), or nltk's if installed (auto)."
    )
    nltk_data: str | None = Field(None, description="nltk's data folder; null = nltk's search path.")
    prompts: str | None = Field(
        None,
        description="Template sentences for parents with fewer than min_test_rows natural contexts: packaged, or a "
        "YAML or JSON file {noun: [sentences with {word}]}; null = none.",
    )
    exclude: str | list[str] = Field(
        PACKAGED,
        description="Words and WordNet synsets (with their hyponyms) to leave out: a list, a file with one per line, "
        "or packaged (slurs and demeaning words); [] = none.",
    )
    max_parents: Whole = Field(80, ge=2, description="Maximum number of parents.")
    max_children_per_parent: Whole = Field(32, ge=2, description="Maximum children per parent.")
    min_children: Whole = Field(3, ge=2, description="Parents with fewer children are dropped.")
    min_words_per_child: Whole = Field(3, ge=3, description="Children with fewer words are dropped.")
    min_test_rows: Whole = Field(20, ge=1, description="Concept metrics need this many held-out rows per parent.")
    label: Literal["belief", "next_token", "current_token"] = Field(
        "belief",
        description="What labels a row: the next token as predicted, the actual next token, or the current token.",
    )
    belief_threshold: float = Field(0.3, gt=0, lt=1, description="Minimum probability of a concept for a belief label.")
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.70, 0.15, 0.15), description="Shares of each child's words for train, val and test."
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> "ConceptsConfig":
        return check_split(self)

    @model_validator(mode="after")
    def _parts_differ(self) -> "ConceptsConfig":
        parts = self.parts_of_speech
        require("parts_of_speech", list(parts), len(set(parts)) == len(parts), "noun and verb, each once at most")
        return self


class DataConfig(Block):
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision of stored activations.")
    shard_rows: Whole = Field(65_536, ge=256, description="Rows per shard file.")
    batch_tokens: Whole = Field(8_192, ge=64, description="Tokens per forward pass of the language model.")
    max_norm_multiple: float | None = Field(
        10.0,
        gt=1,
        description="Rows with a norm above this multiple of the median train norm are left out of training and pooled "
        "metrics; null = keep all.",
    )
    normalize: Literal["rms", "unit_row", "none"] = Field(
        "rms", description="rms = (h - mean)/scale with E|x|^2 = d; unit_row = h/|h|; none."
    )
    bias_rows: Whole | None = Field(
        4096, ge=1, description="Train rows for the geometric median at which b_dec starts; null = all."
    )


class GeometryConfig(Block):
    metric: Literal["causal", "identity", "diagonal", "random"] = Field(
        "causal", description="Metric of the unembedding's rows. causal = by their covariance; the others are controls."
    )
    shrinkage: float = Field(0.05, ge=0, lt=1, description="Shrinkage of the covariance to a multiple of I.")
    estimator: Literal["mean", "lda"] = Field("mean", description="Concept vector: mean of its tokens, or LDA.")
    permutations: Whole = Field(1000, ge=100, description="Permutations per test.")
