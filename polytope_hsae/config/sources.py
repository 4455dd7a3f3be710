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
    name: str = Field("run", description="Folder name of the run below runs/.", pattern=FOLDER_NAME)
    seed: Whole = Field(0, ge=0, description="Seed of everything random in the run.")
    device: str = Field("auto", description="auto (CUDA if there is one), cpu, cuda or cuda:N.")
    threads: int = Field(2, ge=1, le=1024, description="CPU threads; part of what makes a CPU run repeatable.")
    deterministic: bool = Field(True, description="Ask PyTorch for deterministic algorithms.")


class ModelConfig(Block):
    name: str = Field("textbook-lm-9m", description="Hub id, folder, or the packaged textbook-lm-9m.")
    revision: str | None = Field(None, description="Hub revision (commit, tag or branch).")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision the language model runs in.")
    hook: str = Field(
        "final_residual_pre_unembed",
        description="final_residual_pre_unembed (after the final norm), layers.N (N-th block, negative from the end), "
        "or any module name, e.g. model.layers.2.",
    )

    @property
    def title(self) -> str:
        """What files call the model: its name, or of a folder the last part of its path."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name


class CorpusConfig(Block):
    source: Source | None = Field(None, description="Kind of corpus; null = by the ending of path.")
    path: str | None = Field(
        None, description="File, folder, pattern of files, or hub dataset; null = the packaged sampled tokens."
    )
    documents: Literal["packed", "blank", "line", "file"] = Field(
        "packed",
        description="A document of a text file: paragraphs packed up to one context, a block between blank lines, "
        "a line, or the file.",
    )
    text_field: str = Field("text", min_length=1, description="The field of the text in JSONL, Parquet and the hub.")
    document_start: str = Field(
        "auto", description="Token that starts a document: auto (docs/method.md section 3), none, bos, eos or its text."
    )
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.80, 0.05, 0.15), description="Shares of documents for train, val and test; unused with heldout_path."
    )
    heldout_path: str | None = Field(
        None, description="Files of the same kind: half of the documents are val, half test; null = path is split."
    )
    max_tokens: Whole = Field(600_000, ge=256, description="Tokens read at most.")
    heldout_tokens: Whole = Field(600_000, ge=256, description="Tokens of heldout_path read at most.")
    heldout_document_tokens: Whole | None = Field(
        None,
        ge=3,
        description="Tokens used of each val and test document at most, so that no book outweighs the rest.",
    )
    context_length: Whole = Field(256, ge=8, description="Tokens of one context at most.")

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
    ontology: str = Field("wordnet", description="wordnet, or a YAML/JSON tree {parent: {child: [words]}}.")
    parts_of_speech: list[Literal["noun", "verb"]] = Field(
        ["noun"],
        min_length=1,
        description="Words of WordNet that are taken; one that is both goes to the first. How a file's words inflect.",
    )
    wordnet: Literal["embedded", "nltk", "auto"] = Field(
        "embedded", description="WordNet 3.0 in the package, nltk's (extra wordnet), or nltk's where it is there."
    )
    nltk_data: str | None = Field(None, description="nltk's data folder; null = where nltk looks itself.")
    prompts: str | None = Field(
        None,
        description="Sentences for parents with fewer than min_test_rows natural contexts: packaged, or a YAML/JSON "
        "file {noun: [sentences with {word}]}; null = none.",
    )
    exclude: str | list[str] = Field(
        PACKAGED,
        description="Words and WordNet's synsets (with all below them) that are left out: a list, a file with one a "
        "line, or packaged (slurs and demeaning words); [] = none.",
    )
    max_parents: Whole = Field(80, ge=2, description="Parents kept at most.")
    max_children_per_parent: Whole = Field(32, ge=2, description="Children kept per parent at most.")
    min_children: Whole = Field(3, ge=2, description="Parents with fewer children are dropped.")
    min_words_per_child: Whole = Field(3, ge=3, description="Children with fewer words are dropped.")
    min_test_rows: Whole = Field(20, ge=1, description="Concept metrics cover parents with this many test rows.")
    label: Literal["belief", "next_token", "current_token"] = Field(
        "belief", description="Which concept a row carries: what the model believes comes next, what comes, what is."
    )
    belief_threshold: float = Field(0.3, gt=0, lt=1, description="Probability mass from which a belief is a label.")
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.70, 0.15, 0.15), description="Shares of words for train, val and test."
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
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Stored activations.")
    shard_rows: Whole = Field(65_536, ge=256, description="Rows per shard file.")
    batch_tokens: Whole = Field(8_192, ge=64, description="Tokens per forward pass of the language model.")
    max_norm_multiple: float | None = Field(
        10.0,
        gt=1,
        description="Rows whose norm is above this multiple of the train rows' median are left out of training and of "
        "pooled metrics, and counted; null = none is left out.",
    )
    normalize: Literal["rms", "unit_row", "none"] = Field(
        "rms", description="rms: (h - mean)/scale so that E|x|^2 = d; unit_row: h/|h|; none."
    )
    bias_rows: Whole | None = Field(
        4096, ge=1, description="Train rows whose geometric median starts b_dec; null = all of them, read as a stream."
    )


class GeometryConfig(Block):
    metric: Literal["causal", "identity", "diagonal", "random"] = Field(
        "causal", description="Metric of the unembedding's rows; causal = their covariance, the rest to compare with."
    )
    shrinkage: float = Field(0.05, ge=0, lt=1, description="Relative shrinkage of the covariance to its mean.")
    estimator: Literal["mean", "lda"] = Field("mean", description="Concept vector from its tokens.")
    permutations: Whole = Field(1000, ge=100, description="Draws of every permutation null.")
