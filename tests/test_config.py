"""The configuration: refusals, overrides, packaged files; and the record that decides what runs again."""

from pathlib import Path

import pytest
import yaml
from models import FACTORED

from polytope_hsae.config import (
    PACKAGE,
    ArmConfig,
    Config,
    ConfigError,
    TrainingConfig,
    dump_yaml,
    load_config,
)
from polytope_hsae.provenance import Provenance

HALF = "\\ud800"  # one half of a surrogate pair, as YAML spells it
PACKAGED = sorted(path.stem for path in (PACKAGE / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """Load a config from a nested dict or YAML text and overrides."""

    def from_tree(tree=None, overrides=None):
        path = tmp_path / "config.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree or {}))
        return load_config(str(path), overrides)

    return from_tree


def refused(load, tree=None, overrides=None):
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as error:
        load(tree, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


# -- values


def test_an_empty_file_gives_the_defaults(load):
    config = load("")
    assert config == Config()
    assert [arm.name for arm in config.arms] == ["baseline", "flat_topk", "teacher", "permuted_teacher"]
    assert [arm.phase for arm in config.arms] == [2, 2, 3, 3]


def stage(**fields):
    return {"training": {"teacher": {"stages": [{"name": "x", "steps": 2, **fields}]}}}


STAGE = "training.teacher.stages.0"


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"hsae": {"n_parrots": 3}}, "hsae.n_parrots: found an unknown key, allowed: n_parents, gate, "),
        ({"hsea": {}}, "hsea: found an unknown key, allowed: run, model, corpus, "),
        ({"arms": [{"name": "a", "stage": 1}]}, "arms.0.stage: found an unknown key, allowed: name, kind, init, "),
        (stage(loss={"l1": 0.1}), f"{STAGE}.loss.l1: found an unknown key, allowed: l1_parent, l1_child, "),
        ({"hsae": {"n_parents": "many"}}, "hsae.n_parents: found 'many', allowed: input should be a valid integer"),
        ({"hsae": {"n_parents": 2**32}}, "hsae.n_parents: found 4294967296, allowed: input should be less than or "),
        ({"hsae": {"gate": "soft"}}, "hsae.gate: found 'soft', allowed: input should be 'hard' or 'straight_through'"),
        ({"hsae": {"tie_projectors": "maybe"}}, "hsae.tie_projectors: found 'maybe', allowed: input should be False, "),
        ({"hsae": {"l1_parent": float("nan")}}, "hsae.l1_parent: found nan, allowed: input should be a finite number"),
        ({"training": {"lr": float("inf")}}, "training.lr: found inf, allowed: input should be a finite number"),
        ({"training": {"lr": -0.001}}, "training.lr: found -0.001, allowed: input should be greater than 0"),
        (stage(lr_mult={"E": -1.0}), f"{STAGE}.lr_mult.E: found -1.0, allowed: input should be greater than or equal"),
        (stage(freeze=["E", "H"]), f"{STAGE}.freeze.1: found 'H', allowed: input should be 'E', 'b_E', "),
        ({"training": {"teacher": {"stages": []}}}, "training.teacher.stages: found [], allowed: list should have "),
        ({"training": {"teacher": {"stages": [{"steps": 2}]}}}, f"{STAGE}.name: found nothing, allowed: a value"),
        ({"hsae": {"n_parents": 4, "topk_parent": 5}}, "hsae.topk_parent: found 5, allowed: at most n_parents = 4"),
        ({"hsae": {"topk_child": 9}}, "hsae.topk_child: found 9, allowed: at most n_children_per_parent = 7"),
        (
            {"hsae": {"topk_child_total": 9, "child_budget": "per_parent"}},
            "hsae.topk_child_total: found 9, allowed: null unless child_budget is shared or batch",
        ),
        (
            {"hsae": {"topk_parent": 2, "topk_child_total": 17}},
            "hsae.topk_child_total: found 17, allowed: at most k * C = 14",
        ),
        ({"corpus": {"split": [0.8, 0.1, 0.2]}}, "corpus.split: found [0.8, 0.1, 0.2], allowed: three shares above 0"),
        ({"concepts": {"split": [1.0, 0.0, 0.0]}}, "concepts.split: found [1.0, 0.0, 0.0], allowed: three shares"),
        ({"run": {"name": "../a"}}, "run.name: found '../a', allowed: string should match pattern"),
        ({"run": {"seed": -1}}, "run.seed: found -1, allowed: input should be greater than or equal to 0"),
        ({"arms": []}, "arms: found [], allowed: list should have at least 1 item"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "arms: found ['a', 'a'], allowed: names that differ"),
        ({"arms": [{"name": "a", "hsae": {"topk_parent": 9999}}]}, "arms.a.hsae.topk_parent: found 9999, allowed: at "),
        ({"arms": [{"name": "a", "hsae": {"topkparent": 1}}]}, "arms.a.hsae.topkparent: found an unknown key, allowed"),
        ({"arms": [{"name": "a", "teacher": {"anchor": 1}}]}, "arms.a.teacher.anchor: found 1, allowed: input should"),
        ({"tracking": {"wandb": "maybe"}}, "tracking.wandb: found 'maybe', allowed: input should be 'off', 'online' "),
    ],
)
def test_each_error_is_one_line_with_field_found_and_allowed(load, tree, words):
    assert refused(load, tree).startswith(words)


@pytest.mark.parametrize("key", ["use_tied_decoders_parent", "use_tied_decoders_child", "tie_projectors"])
def test_one_tensor_cannot_read_and_write_apart(load, key):
    hsae, dual = {**FACTORED, key: True}, {"init": "dual"}
    message = refused(load, {"hsae": hsae, "teacher": dual})
    assert message == f"hsae.{key}: found true, allowed: false or init: the dual teacher reads and writes apart"
    assert load({"hsae": hsae, "teacher": {"init": "literal"}}).teacher.init == "literal"
    assert load({"hsae": hsae, "teacher": dual, "arms": [{"name": "baseline"}]}).arms[0].phase == 2


def test_a_threshold_needs_an_encoder_bias(load):
    tree = {"hsae": {"use_encoder_bias": False}, "teacher": {"threshold": 0.3}}
    allowed = "null unless hsae.use_encoder_bias is true"
    assert refused(load, tree) == f"arms.teacher.teacher.threshold: found 0.3, allowed: {allowed}"
    assert load({**tree, "arms": [{"name": "baseline"}]}).teacher.threshold == 0.3


def two_stages(first, **training):
    stages = [{"name": "a", "steps": 10, **first}, {"name": "b", "steps": 990, "loss": {"causal_ortho_lambda": 0}}]
    return {"hsae": {"causal_ortho_lambda": 0.1}, "training": {"teacher": {"stages": stages}, **training}}


def test_a_penalty_without_gradient_or_metric_is_refused(load):
    assert load(two_stages({"freeze": ["D", "G"]})).training.teacher.steps == 1000
    message = refused(load, two_stages({"freeze": ["D", "G", "Up"]}))
    assert message == (
        "stage a: freeze: found ['D', 'G', 'Up'], allowed: a list without Up, D or G: "
        "causal_ortho_lambda needs a gradient"
    )
    tree = two_stages({"loss": {"causal_ortho_lambda": 0.3}})
    assert load(tree).training.teacher.stages[0].loss.causal_ortho_lambda == 0.3
    tree["hsae"]["causal_ortho_lambda"] = 0.0
    message = refused(load, tree)
    assert message == "hsae.causal_ortho_lambda: found 0.0, allowed: above 0, because stage a turns it on"


def test_unequal_budgets_are_refused_unless_allowed(load):
    tree = {"training": {"baseline": {"stages": [{"name": "train", "steps": 700}]}}}
    message = refused(load, tree)
    assert message == (
        "training stages: found steps {'baseline': 700, 'flat_topk': 700, 'teacher': 1000, 'permuted_teacher': 1000}, "
        "allowed: the same number of steps for every arm, or training.allow_unequal_budget: true"
    )
    tree["training"]["allow_unequal_budget"] = True
    assert load(tree).training.baseline.steps == 700


def test_a_bare_off_means_off(load):
    assert load("tracking: {wandb: off}").tracking.wandb == "off"
    assert load({}, ["tracking.wandb=off"]).tracking.wandb == "off"
    assert load({}, ["tracking.wandb=offline"]).tracking.wandb == "offline"


def test_yaml_numbers_that_pyyaml_reads_as_words(load):
    assert load("training: {lr: 3e-4}").training.lr == 3e-4
    arms = [{"name": "a", "hsae": {"l1_parent": "1e-3"}}]
    config = load({"arms": arms})
    assert config.arm_hsae(config.arm("a")).l1_parent == 1e-3


# -- overrides


def test_overrides_reach_every_depth(load):
    stages = {"stages": [{"name": "a", "steps": 10, "freeze": ["D", "G"]}, {"name": "b", "steps": 990}]}
    config = load(
        {"training": {"teacher": stages}, "arms": [{"name": "x", "init": "teacher"}]},
        [
            "run.seed=7",
            "model.revision=null",
            "hsae.use_tied_decoders_parent=false",
            "hsae.topk_child_total=5",
            "training.teacher.stages.0.steps=20",
            "training.teacher.stages.1={name: c, steps: 5}",
            "training.teacher.stages.0.freeze.0=E",  # the same item number twice in one path
            "training.teacher.stages.0.lr_mult.E=0.5",
            "arms.0.name=y",
            "corpus.split=[0.6, 0.2, 0.2]",
            "corpus.path=a=b.txt",
            "training.grad_clip=null",
        ],
    )
    assert config.run.seed == 7
    assert config.hsae.use_tied_decoders_parent is False
    assert config.hsae.active_children == 5
    first, second = config.training.teacher.stages
    assert (first.steps, first.freeze, first.lr_mult) == (20, ["E", "G"], {"E": 0.5})
    assert (second.name, second.steps) == ("c", 5)
    assert config.arms[0].name == "y"
    assert config.corpus.split == (0.6, 0.2, 0.2)
    assert config.corpus.path == str(Path("a=b.txt").absolute())
    assert config.training.grad_clip is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.seed", "--set: found 'run.seed', allowed: key.path=value"),
        ("=3", "--set: found '=3', allowed: key.path=value"),
        (
            "run.seed=[1",
            "--set run.seed: found '[1', allowed: a YAML value (line 1: expected ',' or ']', but got '<stream end>')",
        ),
        ("arms.3.name=x", "--set arms.3.name: found item '3', allowed: 0 to 1"),
        ("arms.first.name=x", "--set arms.first.name: found item 'first', allowed: 0 to 1"),
        ("arms.²=x", "--set arms.²: found item '²', allowed: 0 to 1"),
        ("run.name.first=x", "--set run.name.first: found a value above 'first', allowed: a block"),
        (
            "run.sede=1",
            "run.sede: found an unknown key, allowed: name, seed, device, threads, deterministic; did you mean seed?",
        ),
        ("training.lr=nan", "training.lr: found 'nan', allowed: input should be a finite number"),
        ("hsae.n_parents=0x" + "f" * 9000, "hsae.n_parents: found a number of thousands of digits, allowed: "),
        (
            "hsae={gate: hard, gate: hard}",
            "--set hsae: found '{gate: hard, gate: hard}', allowed: a YAML value (line 1",
        ),
        ("arms=&a [*a]", "--set arms: found '&a [*a]', allowed: a YAML value (line 1: found an alias or a tag"),
        ("model.name=!!python/name:os.system", "--set model.name: found '!!python/name:os.system', allowed: a YAML "),
        (f'model.name="{HALF}"', "--set model.name: found "),
        ("model.name=\udcff", "--set model.name: found '\\udcff', allowed: a YAML value"),
        ("corpus.split=" + "[" * 99, "--set corpus.split: found "),
        ("a..b=1", "--set: found 'a..b=1', allowed: key.path=value"),
        ("0=1", "0: found an unknown key, allowed: run, model"),
        ("arms.9" + "9" * 5000 + "=1", "--set arms.9"),
        ("arms.-1=1", "--set arms.-1: found item '-1', allowed: 0 to 1"),
        ("\n=1", "\\n: found an unknown key, allowed: run, model"),
    ],
)
def test_overrides_that_are_refused(load, override, message):
    found = refused(load, {"run": {"name": "n"}, "arms": [{"name": "a"}, {"name": "b"}]}, [override])
    assert found.startswith(message)
    assert "allowed: " in found


# -- arms


def test_an_arm_replaces_fields_and_stages():
    arms = [
        ArmConfig(name="a", hsae={"gate": "hard"}, teacher={"anchor": "frozen"}),
        ArmConfig(name="b", init="permuted_teacher"),
        ArmConfig(name="c", stages="teacher"),
    ]
    base = {"name": "x", "steps": 1000}
    config = Config(arms=arms, training=TrainingConfig.model_validate({"teacher": {"stages": [base]}}))
    a, b, c = (config.arm(name) for name in "abc")
    assert config.arm_hsae(a).gate == "hard"
    assert config.arm_hsae(b) == config.hsae
    assert config.arm_teacher(a).anchor == "frozen"
    assert [stage.name for stage in config.arm_stages(a)] == ["train"]
    assert [stage.name for stage in config.arm_stages(b)] == ["x"]
    assert [stage.name for stage in config.arm_stages(c)] == ["x"]
    assert (a.phase, b.phase, c.phase) == (2, 3, 2)
    with pytest.raises(KeyError):
        config.arm("d")


# -- files and schema


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_configs_load_and_come_back_from_their_own_dump(name, load):
    config = load_config(name)
    assert load(dump_yaml(config)) == config
    assert config.run.name == name


def test_every_field_has_a_description():
    schema = Config.model_json_schema()
    blocks = {"Config": schema, **schema["$defs"]}
    missing = [
        f"{block}.{name}"
        for block, definition in blocks.items()
        for name, field in definition.get("properties", {}).items()
        if not field.get("description", "").strip()
    ]
    assert len(blocks) > 15
    assert missing == []
    assert all(definition.get("additionalProperties") is False for definition in blocks.values())


# -- provenance


def test_what_a_phase_does_not_depend_on_does_not_matter(tmp_path):
    config = Config()
    record = Provenance(tmp_path)
    for phase in (1, 2, 3, 4):
        record.record(phase, config, {}, "cpu", 1.0)

    def done(changed):
        """The phases that are skipped; the others' first difference."""
        answers = {}
        for phase in (1, 2, 3, 4):
            try:
                answers[phase] = record.is_done(phase, changed, {}, [], force=False)
            except ConfigError as error:
                answers[phase] = str(error).split(":")[0]
        return answers

    def changed(**blocks):
        return config.model_copy(
            update={name: getattr(config, name).model_copy(update=fields) for name, fields in blocks.items()}
        )

    skipped = dict.fromkeys((1, 2, 3, 4), True)
    assert done(config) == skipped
    elsewhere = {"threads": 9, "device": "cuda:1", "name": "elsewhere"}
    assert done(changed(run=elsewhere, tracking={"wandb": "offline"}, training={"checkpoint_every": 7})) == skipped
    assert done(changed(run={"seed": 1})) == dict.fromkeys((1, 2, 3, 4), "run.seed")
    assert done(changed(eval={"bootstrap": 200})) == {**skipped, 4: "eval.bootstrap"}
    assert done(changed(teacher={"energy": 0.5})) == {**skipped, 3: "teacher.energy"}
    assert done(changed(hsae={"gram_lambda": 0.1})) == {**skipped, 2: "hsae.gram_lambda", 3: "hsae.gram_lambda"}
    assert done(changed(geometry={"shrinkage": 0.2})) == {**skipped, 1: "geometry.shrinkage"}
