"""What later commands read of the JSON files that phases write (docs/design.md, Artifacts): for `fileio.read_json`.

Other fields may be there; those named here must be.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Validation(TypedDict):
    val_ev: float
    val_l0: Annotated[float, Field(ge=0)]


class Train(TypedDict):
    """train.json of an arm."""

    arm: str
    identity: dict[str, str]
    steps: int
    tokens: int
    parameters: int
    flops_per_row: int
    teacher_parents: list[Annotated[int, Field(ge=0)]]
    validation: Validation


class CheckedParent(TypedDict):
    name: str
    templated: dict[str, int] | None


class Checks(TypedDict):
    """checks.json of phase 1."""

    parents: list[CheckedParent]


class Angles(TypedDict):
    estimator: str
    median_angle_deg: float
    median_ci95: Interval


Columns = dict[str, list[str | int | float | None]]


class Decision(TypedDict):
    """Whether a hierarchy with orthogonal differences was shown, and by which tests."""

    hierarchy: bool
    alpha: float
    tests: dict[str, dict[str, Any]]


class Hierarchy(TypedDict):
    """What evidence.json says of WordNet's parents."""

    parents: Columns
    children: Columns
    angles: Angles
    fraction_z_above_3: float | None
    median_beta: float | None
    beta_ci95: Interval | None
    decision: NotRequired[Decision]  # runs of earlier versions have none


class Control(TypedDict, total=False):
    """The same of a control; `why` stands for what too few parents do not give."""

    parents: Columns
    children: Columns
    angles: Angles | None
    fraction_z_above_3: float | None
    why: str


class Evidence(TypedDict):
    """evidence.json."""

    model: str
    rows_of: str
    permutations: int
    main: Hierarchy
    shuffled_rows: Control
    pseudo_parents: Control


class SplitNorms(TypedDict):
    """Rows of massive norm in a split; `tokens`: their tokens with counts, the most frequent first."""

    rows: int
    massive: Annotated[int, Field(ge=0)]
    largest_norm: float
    share_of_squared_deviation: float
    tokens: list[Annotated[list[str | int], Field(min_length=2, max_length=2)]]


class Norms(TypedDict):
    """norms.json of phase 1; `limit`: the multiple of the median from which rows are left out, None: none are."""

    median_norm: float
    limit: float | None
    splits: dict[str, SplitNorms]


class Metric(TypedDict):
    value: float | None
    ci95: Interval | None
    chance: float | None
    n: int


class Metrics(TypedDict):
    """The metrics of one arm that are printed; there are more."""

    ev: Metric
    ev_all_rows: NotRequired[Metric]  # runs of earlier versions lack it, as the next
    ev_row_mean: NotRequired[Metric]
    ev_causal: Metric
    ev_logit: Metric
    ce_recovered: Metric
    kl: Metric
    l0: Metric
    purity: Metric
    leakage: Metric
    recall: Metric
    split: Metric
    absorb: Metric
    absorb_with_children: Metric
    steering_leakage: Metric
    edge_precision: Metric
    edge_recall: Metric
    child_given_parent: Metric
    probe_min: Metric
    dead_parents: Metric
    dead_children: Metric
    entropy: Metric


class Target(TypedDict):
    name: str
    required: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    measured: float | None
    ci95: Interval | None
    n: int
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    why: NotRequired[str]
    controls: NotRequired[dict[str, float | None]]


class Results(TypedDict):
    """results.json."""

    model: str
    hook: str
    label: str
    split: Literal["val", "test"]
    arms: Annotated[dict[str, Metrics], Field(min_length=1)]
    targets: Annotated[list[Target], Field(min_length=1)]


class Ablations(TypedDict):
    """ablations.json."""

    reference: str
    differences: dict[str, dict[str, Metric]]
    against_teacher: dict[str, dict[str, Metric]]
    concepts: dict[str, list[dict[str, Any]]]


class Steering(TypedDict):
    """steering.json."""

    target_nats: float
    arms: dict[str, list[dict[str, Any]]]
    grid: dict[str, list[dict[str, Any]]]


class Interventions(TypedDict):
    """interventions.json; `why` stands for what a model without an output head does not give."""

    agreement: dict[str, Any]
    target_nats: NotRequired[float]
    ratio_invariance: NotRequired[dict[str, Any]]
    targeting: NotRequired[dict[str, Any]]
    why: NotRequired[str]
