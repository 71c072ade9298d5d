"""The DeepSpeed JSON of a run: the user's, untouched, with "auto" filled in; or a default one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from gkd.config.training import TrainingSettings
from gkd.errors import ConfigError, shown
from gkd.files import read_json_object

_KINDS: dict[Any, str] = {  # bool before the numbers, of which it is one
    dict: "an object", list: "a list", str: "a text", bool: "true or false", int | float: "a number",
}  # fmt: skip


def deepspeed_config(training: TrainingSettings, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    A value the user's JSON sets stays; "auto" and what is absent are filled from `training`. Raises
    ConfigError for a JSON that cannot be read, or that contradicts the batch size of `optim`.
    """
    path = training.deepspeed.config
    user = {} if path is None else read_json_object(Path(path), ConfigError, "deepspeed.config")
    # packed, DeepSpeed only hears of single sequences: how many forwards a step takes is said to it at each
    micro_batch_size = training.optim.micro_batch_size if training.optim.micro_batch_tokens is None else 1
    accumulation = training.optim.batch_size // (micro_batch_size * world_size)
    defaults: dict[str, Any] = {
        "train_batch_size": training.optim.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.optim.max_grad_norm,
        "zero_optimization": {"stage": training.deepspeed.zero_stage},
        # torch's fused AdamW needs no compiler, unlike DeepSpeed's own, and is no slower, offloaded or not
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # the run has its own progress
    }
    filled = _fill(user, {**defaults, **_values_for_auto(training)}, path="")
    for key, value in defaults.items():
        filled.setdefault(key, value)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if filled[key] != defaults[key]:
            raise ConfigError(
                f"deepspeed.config: {key} is {filled[key]}, but optim.batch_size and optim.micro_batch_size on "
                f'{world_size} ranks make it {defaults[key]}; set it to "auto"'
            )
    if not _sets_precision(filled) and training.dtype != "float32":
        if training.dtype == "float16" and filled["zero_optimization"]["stage"]:
            # not autocast, with which DeepSpeed 0.19 clips a sharded gradient by the norm of the still scaled one
            filled["fp16"] = {"enabled": True}
        else:
            # float32 master weights under autocast: the update is exact whatever the ZeRO stage
            filled["torch_autocast"] = {"enabled": True, "dtype": training.dtype}
    if training.compile and filled["zero_optimization"]["stage"] == 3:
        raise ConfigError(
            "student.compile: ZeRO-3 gathers weights inside the layers; set it to false, or a lower stage"
        )
    return filled


def scales_loss(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed scales the loss, as float16 needs: it then expects overflows, and leaves out their steps."""
    autocast = settings.get("torch_autocast", {})
    is_float16 = str(autocast.get("dtype", "")).removeprefix("torch.") in ("float16", "fp16", "half")
    return bool(settings.get("fp16", {}).get("enabled") or (autocast.get("enabled") and is_float16))


def _values_for_auto(training: TrainingSettings) -> dict[str, Any]:
    """Values for "auto" entries that are not added where the user's JSON has none."""
    adamw = {
        "lr": training.optim.lr,
        "betas": list(training.optim.betas),
        "eps": training.optim.eps,
        "weight_decay": training.optim.weight_decay,
    }
    return {
        "bf16": {"enabled": training.dtype == "bfloat16"},
        "fp16": {"enabled": training.dtype == "float16"},
        "torch_autocast": {"enabled": training.dtype != "float32", "dtype": training.dtype},
        "optimizer": {"params": adamw},
        "scheduler": {
            "params": {
                "warmup_num_steps": training.optim.warmup_steps,
                "warmup_min_lr": 0.0,
                "warmup_max_lr": training.optim.lr,
                "total_num_steps": training.steps,
            }
        },
    }


def _fill(user: dict[str, Any], known: dict[str, Any], path: str) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for key, value in user.items():
        here = f"{path}{key}"
        if value == "auto":
            if key not in known or isinstance(known[key], dict):
                raise ConfigError(f'deepspeed.config: {here} is "auto", but the run has no value for it')
            filled[key] = known[key]
            continue
        if key in known:
            _check_kind(here, value, known[key])
        if isinstance(value, dict):
            inner = known.get(key)
            own = cast("dict[str, Any]", inner if isinstance(inner, dict) else {})
            filled[key] = _fill(cast("dict[str, Any]", value), own, f"{here}.")
        else:
            filled[key] = value
    if path == "" and "zero_optimization" in filled:
        filled["zero_optimization"].setdefault("stage", known["zero_optimization"]["stage"])
    return filled


def _check_kind(where: str, value: Any, example: Any) -> None:
    """Raises ConfigError unless a user's value is of the kind that stands there otherwise."""
    kind, name = next((kind, name) for kind, name in _KINDS.items() if isinstance(example, kind))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"deepspeed.config: {where} must be {name}, not {shown(value)}")


def _sets_precision(values: dict[str, Any]) -> bool:
    return any(values.get(section, {}).get("enabled") for section in ("bf16", "fp16", "torch_autocast"))
