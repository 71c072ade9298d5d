"""The config: strict, frozen, overridable, with errors that name the key and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkd.config import Launch, MixtureConfig, describe_keys, load_config, make_config
from gkd.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
MINIMAL = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}


def with_values(**sections: dict[str, object]) -> dict[str, object]:
    return {**MINIMAL, **sections}


RULE = {"metric": "loss", "from": 0.0, "to": 1.0, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    load_config(path)
    header = path.read_text()[:600]
    assert "gkd train" in header and "Tried on" in header, "the header gives the exact command and the hardware"


def test_a_config_is_frozen() -> None:
    config = make_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3  # pyright: ignore


STATES = {"kind": "hidden_states"}
RKD = {"kind": "rkd"}
SERVED = {"placement": "served", "addresses": ["http://127.0.0.1:1"]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"temprature": 1.0}}, r"rollout\.temprature: unknown key; did you mean rollout\.temperature\?"),
        ({"rollout": {"lr": 1.0}}, r"rollout\.lr: unknown key; did you mean optim\.lr\?"),
        ({"rolout": {}}, r"rolout: unknown key; did you mean rollout\?"),
        ({"optim": {"lr": "abc"}}, r"optim\.lr: .*valid number.*'abc'"),
        ({"rollout": {"max_num_seqs": 0}}, r"config: rollout\.max_num_seqs: [^;:]*equal to 1, or be 'auto', not 0$"),
        (
            {"rollout": {"enforce_eager": "no"}},
            r"config: rollout\.enforce_eager: [^;:]* boolean, or be 'auto', not 'no'$",
        ),
        ({"run": {"steps": 0}}, r"run\.steps: .*greater than or equal to 1, not 0"),
        ({"run": {"steps": 1.5}}, r"run\.steps: "),
        ({"run": {"name": "../x"}}, r"run\.name: '\.\./x'"),
        ({"mixture": {"student": 0.5}}, r"mixture\.student \+ teacher \+ dataset is 0\.5, must be 1; set student to 1"),
        ({"objective": {"beta": 1.5}}, r"objective\.beta: 1\.5 must be at least 0 and at most 1"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature: .*greater than 0"),
        ({"objective": {"kind": "cross_entropy", "on": ["dataset"]}}, r"objective\.on: dataset, but mixture"),
        ({"objective": {"kind": "forward_lk"}}, r"objective\.kind: unknown .* did you mean 'forward_kl'"),
        ({"objective": {"terms": [{}, {}]}}, r"objective\.terms: 2 are called 'forward_kl'; give each a name"),
        ({"objective": {"terms": [{"weight": 0.0}]}}, r"objective\.terms: every weight is 0"),
        ({"objective": {"weight": {"from": 1.0, "to": -1.0, "steps": 5}}}, r"objective\.weight: -1 must be at least 0"),
        ({"objective": {"temperature": {"from": 1.0, "steps": 5}}}, r"objective\.temperature\.to: is missing"),
        ({"objective": {"weight": {"from": 0.0, "to": 1.0, "steps": 5, "shape": "cosin"}}}, r"did you mean 'cosine'"),
        ({"objective": {"kind": "cross_entropy", "beta": 0.5}}, r"objective\.beta: unknown key; it is of another"),
        ({"objective": {"token_weight": {"drfit": {}}}}, r"objective\.token_weight: unknown .* did you mean 'drift'"),
        ({"objective": {"token_weight": {"drift": {"gama": 1.0}}}}, r"token_weight\.drift\.gama: unknown key"),
        ({"objective": {"kind": "jsd", "token_weight": {"adaptive": {}}}}, r"adaptive: is for a forward_kl"),
        (
            {"objective": STATES, "teacher": {"model": "t", **SERVED}},
            r"objective\.terms\.0: .* served does not tell; set",
        ),
        (
            {"objective": STATES, "teacher": {"model": "t", **SERVED, "placement": "topk"}},
            r"objective\.terms\.0: hidden_states .* topk does not tell; set that to local or sharded",
        ),
        ({"objective": STATES, "teacher": {"model": "t", "cache_gib": 1.0}}, r"cache_gib does not keep; set that to 0"),
        ({"objective": STATES, "other_teachers": {"b": {"model": "t", "weight": 0.5}}}, r"leave out other_teachers"),
        (
            {"objective": RKD, "other_teachers": {"b": {"model": "t", "weight": 0.5}}},
            r"objective\.terms\.0: rkd compares sequences by the vectors of one teacher; leave out other_teachers",
        ),
        (
            {"objective": RKD, "teacher": {"model": "t", **SERVED, "placement": "topk"}},
            r"objective\.terms\.0: needs the teacher's whole distribution, not a top k",
        ),
        ({"objective": {**RKD, "distance": 0.0, "angle": 0.0}}, r"objective\.angle: it and distance are both 0"),
        ({"objective": {**STATES, "token_weight": {"drift": {}}}}, r"objective\.token_weight: weighs distributions"),
        ({"objective": {**STATES, "layers": [[1, 2, 3]]}}, r"objective\.layers"),
        ({"objective": {"beta": RULE}}, r"objective\.beta: a rule that follows a metric is for weights"),
        (
            {"objective": {"weight": {**RULE, "metric": "time/step_s"}}},
            r"weight\.metric: time/step_s differs from rank",
        ),
        ({"mixture": {"studnt": 1.0}}, r"mixture\.studnt: unknown source 'studnt'; did you mean 'student'"),
        (
            {"mixture": {"student": {"from": 1.0, "to": 0.5, "steps": 10}}},
            r"mixture\.student \+ teacher \+ dataset is 0\.95 at step 1, must be 1; set student to 1",
        ),
        (
            {"mixture": {"student": {"from": 1.0, "to": 0.5, "steps": 10**9}}},
            r"mixture: ramps that do not run together .* these last 1000000000; give",
        ),
        ({"plugins": ["no_such_module"]}, r"plugins\.0: no module 'no_such_module' is installed"),
        ({"plugins": ["../x"]}, r"plugins\.0: '\.\./x' is no name of a module"),
        (
            {"optim": {"batch_size": 7, "micro_batch_size": 1}, "rollout": {"samples_per_prompt": 2}},
            r"optim\.batch_size: 7 .*samples_per_prompt = 2; the nearest is 8",
        ),
        ({"optim": {"schedule": "cosine", "warmup_steps": 100}}, r"optim\.warmup_steps: 100 .*at most 99"),
        ({"deepspeed": {"config": "missing.json"}}, r"deepspeed\.config: no file 'missing\.json'"),
        ({"deepspeed": "missing.json"}, r"deepspeed\.config: no file"),
        ({"student": {"dtype": "bfloat16"}}, r"student\.model: name a model"),
        ({"data": {}}, r"data\.train: is missing"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr: "),
    ],
)
def test_errors_name_the_key(sections: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(with_values(**sections))


def test_world_size_must_divide() -> None:
    config = make_config(with_values(optim={"batch_size": 12, "micro_batch_size": 4}))
    config.check_world_size(3)
    with pytest.raises(ConfigError, match=r"optim\.batch_size: 12 .*4 x 2; the nearest is 16"):
        config.check_world_size(2)


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("teacher: {model: t}\nstudent: {init: {layers: 4}}\ndata: {train: d.jsonl}\noptim: {lr: 3e-4}\n")
    config = load_config(path, ["optim.betas=[0.9, 0.95]", "student.init.layers=[0, 3]", "run.name=x", "run.dir=null"])
    assert config.optim.lr == 3e-4, "YAML 1.1 would read 3e-4 as text"
    assert config.optim.betas == (0.9, 0.95)
    assert config.student.init is not None and config.student.init.layers == [0, 3]
    assert config.run.folder == Path("runs/x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"run\.yaml:1: "),
        ("run:\n  steps: 1\n  steps: 2\n", r"run\.yaml:3: key 'steps' stands twice"),
        ("just text", r"run\.yaml:1: expected sections"),
        ("a: !!python/object/apply:os.system ['true']", r"run\.yaml:1: could not determine a constructor"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


REFUSED_OVERRIDES = [
    ("run.steps=!!int x", r"override run\.steps:1: 'x' cannot be read as int"),
    ("run.steps=!!bool x", "'x' cannot be read as bool"),
    ("run.name=!!timestamp 2026-13-45", "'2026-13-45' cannot be read as timestamp"),
    ("optim.lr={[a]: b}", r"override optim\.lr:1: key \['a'\] is no text"),
    ("optim={3: b}", "key 3 is no text; put it in quotes"),
    ("run.na\nme\x1b[2J=x", r"run\.na\\nme\\x1b\[2J: unknown key"),
    ('run={"na\\nme": x}', r"run\.na\\nme: unknown key"),
    ("run.name=a\x07", "holds a character that YAML does not allow"),
    ('run.name="\\ud800"', r"run\.name: holds a NUL character or half a surrogate pair"),
    ("run.name=" + "n" * 300, r"run\.name: .* 100 at most"),
    ("run.name=" + "[" * 5000, "nested deeper"),
    ("run." + "k" * 9000 + "=1", r"run\.k+ \.\.\. k+: unknown key; known: name"),
    ("run.name=&a [*a]", "does an alias repeat itself"),
    ("run.seed=0x" + "f" * 9000, r"run\.seed: must be a finite number below 2\^63"),
    ("run.seed=" + "9" * 9000, "cannot be read as int"),
    ("data.chat_template_kwargs={a: !!set {b}}", r"data\.chat_template_kwargs\.a: a config holds no set"),
    ("data.chat_template_kwargs={a: .nan}", r"data\.chat_template_kwargs\.a: must be a finite number"),
    ("data.train=''", r"data\.train: expected a path or name, not ''"),
    ("data.train=" + "x" * 300, r"data\.train: expected what a path has room for, not 'x+\.\.\.x+'"),
    ("deepspeed.config=" + "x" * 300, r"deepspeed\.config: expected what a path has room for"),
    ("objective.kind=[a]", r"objective\.kind: unknown kind \['a'\]"),
    ("<x.a=1", "<x: unknown key"),
    ("run.dir=~nobody-of-this-name/x", r"run\.dir: expected a home folder that there is"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED_OVERRIDES, ids=[o[:24] for o, _ in REFUSED_OVERRIDES])
def test_whatever_is_wrong_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("teacher: {model: t}\nstudent: {model: s}\ndata: {train: d.jsonl}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [override])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2010


def test_a_date_is_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("teacher: {model: t}\nstudent: {model: s}\ndata: {train: d.jsonl}\nrun: {name: 2026-11-30}\n")
    assert load_config(path).run.name == "2026-11-30"
    assert load_config(path, ["run.name=2026-13-45"]).run.name == "2026-13-45"


def test_an_alias_cannot_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 10,000 values"):
        load_config(path)


def test_of_many_errors_ten_are_named() -> None:
    with pytest.raises(ConfigError, match=r"key9: unknown key.*; and 41 more$") as caught:
        make_config({**MINIMAL, "run": {f"key{i}": 1 for i in range(51)}})
    assert "key10:" not in str(caught.value)


def test_an_override_of_a_section_that_an_alias_repeats_is_of_that_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("teacher: &same {model: t}\nstudent: *same\ndata: {train: d.jsonl}\n")
    config = load_config(path, ["student.dtype=float32"])
    assert (config.student.dtype, config.teacher.dtype) == ("float32", "auto")


@pytest.mark.parametrize("override", ["run.steps", "=1", "run.=1", "run.steps.more=1"])
def test_broken_overrides(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {steps: 3}")
    with pytest.raises(ConfigError, match="override"):
        load_config(path, [override])


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"run: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 5"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "other.yaml")


def test_the_key_on_is_text(tmp_path: Path) -> None:
    """YAML 1.1 has it for true."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "teacher: {model: t}\nstudent: {model: s}\ndata: {train: d}\nmixture: {student: 0.5, dataset: 0.5}\n"
        "objective:\n  terms:\n    - {kind: forward_kl, on: [student]}\n"
        "    - kind: cross_entropy\n      on: [dataset]\n"
        "log: {tensorboard: on}\n"
    )
    config = load_config(path, ["objective.chunk_mib=8"])
    assert [term.on for term in config.objective.terms] == [["student"], ["dataset"]]
    assert config.log.tensorboard is True and config.objective.chunk_mib == 8


def ramp(start_value: float, end_value: float, steps: int, **others: object) -> dict[str, object]:
    return {"from": start_value, "to": end_value, "steps": steps, **others}


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "fractions",
    [
        {"student": ramp(1.0, 0.25, 10**9, shape="cosine"), "teacher": ramp(0.0, 0.75, 10**9, shape="cosine")},
        {"student": ramp(1.0, 0.0, 10), "teacher": ramp(0.0, 0.5, 5), "dataset": ramp(0.0, 0.5, 5, start=5)},
        {"student": ramp(0.0, 1.0, 1, start=10**9), "teacher": ramp(1.0, 0.0, 1, start=10**9)},
    ],
)
def test_fractions_add_up_however_long_their_ramps_are(fractions: dict[str, object]) -> None:
    made = MixtureConfig.model_validate(fractions)
    for step in (0, 3, 5, 7, 10, 10**8, 10**9 + 1):
        assert sum(made.at(step).values()) == pytest.approx(1.0)


def test_every_key_is_described() -> None:
    rows = describe_keys()
    assert {"run.steps", "teacher.model", "student.init.layers", "deepspeed.zero_stage"} <= {path for path, *_ in rows}
    assert [path for path, _, description in rows if not description] == []


def test_launch_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(rank=0, local_rank=0, world_size=1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "5"}.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(rank=3, world_size=4, meeting_point="node1:5")
