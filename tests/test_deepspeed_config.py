"""The DeepSpeed JSON: defaults, what passes through untouched, what "auto" becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from gkd.config import Launch
from gkd.config.deepspeed import deepspeed_config
from gkd.config.training import TrainingSettings
from gkd.errors import ConfigError
from gkd.models import load_causal_lm
from gkd.train.deepspeed_check import check_deepspeed, deepspeed_refusals
from gkd.train.engine import StudentEngine


def training(tmp_path: Path, user: Any = None, **sections: Any) -> TrainingSettings:
    values: dict[str, Any] = {
        "optim": {"batch_size": 8, "micro_batch_size": 2, "max_grad_norm": 0.5, "lr": 1e-4, "warmup_steps": 3},
        **sections,
    }
    if user is not None:
        path = tmp_path / "ds.json"
        path.write_text(user if isinstance(user, str) else json.dumps(user))
        values["deepspeed"] = {"config": str(path), "zero_stage": 1}
    return TrainingSettings.model_validate(values)


def test_defaults(tmp_path: Path) -> None:
    settings = deepspeed_config(training(tmp_path, deepspeed={"zero_stage": 2}), world_size=2)
    assert settings["train_batch_size"] == 8 and settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"] == {"stage": 2} and settings["gradient_clipping"] == 0.5
    assert "torch_autocast" not in settings, "float32 is float32"


def test_half_precision_is_autocast_over_float32_weights(tmp_path: Path) -> None:
    settings = deepspeed_config(training(tmp_path, dtype="bfloat16"), 1)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("stage", "user", "key"),
    [(2, None, "student.dtype"), (0, {"fp16": {"enabled": True}}, "deepspeed.config: fp16.enabled"), (0, None, None)],
)
def test_float16_where_deepspeed_has_none_is_refused_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, user: Any, key: str | None
) -> None:
    """Under autocast, without ZeRO, DeepSpeed does not mind."""
    dtype = "float16" if user is None else "float32"
    chosen = training(tmp_path, user, dtype=dtype, deepspeed={"zero_stage": stage})
    for supported in (True, None, False):  # DeepSpeed says None
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda supported=supported: supported)
        if supported or key is None:
            check_deepspeed(chosen, 1)
        else:
            with pytest.raises(ConfigError, match=f"^{key}: DeepSpeed trains no float16 on this processor"):
                check_deepspeed(chosen, 1)


def test_what_the_user_sets_stays(tmp_path: Path) -> None:
    user = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5},
        "gradient_clipping": 0.25,
        "optimizer": {"type": "SGD", "params": {"lr": 7.0}},
        "zero_allow_untested_optimizer": False,
        "made_up": {"key": [1, 2]},
    }
    settings = deepspeed_config(training(tmp_path, user), 1)
    for key, value in user.items():
        assert settings[key] == value


def test_auto_is_filled(tmp_path: Path) -> None:
    user = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-6}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
    }
    settings = deepspeed_config(training(tmp_path, user, dtype="bfloat16"), 2)
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert settings["gradient_accumulation_steps"] == 2 and settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["bf16"] == {"enabled": True} and "torch_autocast" not in settings
    assert settings["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-6}
    assert settings["scheduler"]["params"] == {"warmup_num_steps": 3, "warmup_max_lr": 1e-4}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"train_batch_size": 16}, r"train_batch_size is 16, but .* make it 8; set it to \"auto\""),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"zero_optimization\.reduce_bucket_size is \"auto\""),
        ({"optimizer": "auto"}, r"optimizer is \"auto\""),
        ("{\n  broken", r"ds\.json:2: "),
        ("[]", r"expected a JSON object"),
    ],
)
def test_contradictions_name_the_key(tmp_path: Path, user: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(training(tmp_path, user), 1)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("configs/deepspeed/*.json")), ids=lambda p: p.name
)
def test_every_shipped_json_fills(tmp_path: Path, path: Path) -> None:
    settings = deepspeed_config(training(tmp_path, path.read_text()), 1)
    assert "auto" not in json.dumps(settings)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"bf16": True}, r"^deepspeed\.config: bf16 must be an object, not True"),
        ({"fp16": None}, r"^deepspeed\.config: fp16 must be an object, not None"),
        ({"zero_optimization": {"stage": "two"}}, r"zero_optimization\.stage must be a number, not 'two'"),
        ({"gradient_clipping": "much"}, r"gradient_clipping must be a number, not 'much'"),
        ({"zero_allow_untested_optimizer": 1}, "must be true or false, not 1"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "x"}}}, r"optimizer\.params\.lr must be a number"),
        (
            {"zero_optimization": {"stage": 7}},
            r"ds\.json: DeepSpeed refuses DeepSpeedZeroConfig\.stage: Input should be 0",
        ),
        ({"zero_optimization": {"staage": 1}}, r"DeepSpeed refuses DeepSpeedZeroConfig\.staage"),
        ({"gradient_cliping": 1.0}, "reads no key 'gradient_cliping', .*; did you mean gradient_clipping"),
        ({"activation_checkpointing": {"zz": 1}}, r"reads no key 'activation_checkpointing\.zz', .*; remove it"),
        ({"sparse_attention": {}}, "DeepSpeed refuses it: DeepSpeed Sparse Attention has been removed"),
    ],
)
def test_what_deepspeed_would_trip_over_or_pass_over(tmp_path: Path, user: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_deepspeed(training(tmp_path, user), 1)


def test_what_deepspeed_reads_is_known(tmp_path: Path) -> None:
    """Sections that it reads key by key, takes whole, or hands on; and whatever `auto` fills in."""
    user = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
        "activation_checkpointing": {"partition_activations": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "tensorboard": {"enabled": False},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "communication_data_type": "fp16",
        "wall_clock_breakdown": False,
    }
    check_deepspeed(training(tmp_path, user), 2)


@pytest.mark.fault
def test_what_deepspeed_refuses_at_its_start_is_one_line() -> None:
    where, why = "deepspeed.config: x", "no such optimizer"
    with pytest.raises(ConfigError, match=f"^{where}: DeepSpeed refuses it: {why}"), deepspeed_refusals(where):
        raise AssertionError(why)


@pytest.mark.fault
@pytest.mark.parametrize(("user", "raised"), [({}, ConfigError), (None, AssertionError)])
def test_only_a_users_json_is_blamed(
    user: dict[str, Any] | None,
    raised: type[Exception],
    tmp_path: Path,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed

    def refuse(**_: Any) -> None:
        raise AssertionError("a fault")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with pytest.raises(raised, match="a fault"):
        StudentEngine(load_causal_lm(str(tiny_student), "float32"), training(tmp_path, user), Launch(), valid_vocab=259)
