"""gkd plan"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gkd.config import load_config
from gkd.errors import ConfigError

if TYPE_CHECKING:
    from gkd.planning.devices import Device
    from gkd.planning.report import Report


def plan_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100-80, b200, l40s or cpu.")] = "h100",
    gpus: Annotated[int | None, typer.Option(help="Training devices in all; default 1, or whole nodes.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines that they are in; default: as few as hold them.")] = None,
    student_config: Annotated[Path | None, typer.Option(help="The student's config.json.")] = None,
    teacher_config: Annotated[Path | None, typer.Option(help="The teacher's config.json.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="Mean; default: half of the longest.")] = None,
    completion_tokens: Annotated[float | None, typer.Option(help="Mean; default: the longest.")] = None,
    teacher: Annotated[
        Literal["local", "sharded", "served"] | None,
        typer.Option(help="Where the teacher is. Default: teacher.placement."),
    ] = None,
    teacher_gpus: Annotated[int, typer.Option(help="Further devices, of a served teacher.")] = 8,
    sampler_gpus: Annotated[
        int | None,
        typer.Option(help="Further devices, of a served sampler, a server each. Default: one a rollout.addresses."),
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0.0, help="In any currency.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also on 1 to 4096 devices.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of the sweep.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's rates; --gpu cpu.")] = False,
    against: Annotated[Path | None, typer.Option(help="summary.json of a run to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Say what a run will cost, from the models' configs alone: memory, seconds, bytes on every link.

    Nothing is loaded. A plan that does not fit ends with exit code 0 too, and with the smallest change that fits.
    """
    from gkd.planning import report as reports
    from gkd.planning.models import architectures
    from gkd.planning.settled import make_setup
    from gkd.planning.setup import placement_of

    resolved = load_config(config, overrides or ())
    student_model, teacher_model = architectures(resolved, student_config, teacher_config)
    device, devices = _devices(gpu, gpus, nodes, measure)
    if resolved.other_teachers:
        raise ConfigError(
            "other_teachers: gkd plan knows of one teacher; add other_teachers={} for a run with it alone"
        )
    placement = teacher or placement_of(resolved)
    if placement == "topk":
        raise ConfigError(
            "teacher.placement: gkd plan cannot know what another server takes for a top k; --teacher served plans for "
            "one of hidden states"
        )
    if placement != "local" and resolved.mixture.with_teacher:
        raise ConfigError(
            f"--teacher: a {placement} one cannot draw the texts of mixture.{resolved.mixture.with_teacher[0]}; "
            "leave it out, or set that to 0"
        )
    if placement == "served" and teacher_gpus < 1:
        raise ConfigError(f"--teacher-gpus: {teacher_gpus} must be at least 1")
    if sampler_gpus is not None and sampler_gpus < 1:
        raise ConfigError(f"--sampler-gpus: {sampler_gpus} must be at least 1")
    asked = make_setup(
        resolved,
        student_model,
        teacher_model,
        device,
        devices,
        sampler_replicas=sampler_gpus,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        teacher_placement=placement,
        teacher_devices=teacher_gpus if placement == "served" else 0,
    )
    report = reports.make_report(asked, price_per_gpu_hour)
    if sweep or plot is not None:
        report = _with_sweeps(report, plot)
    if against is not None:
        from gkd.planning.compare import compare
        from gkd.planning.time import time_plan

        report = replace(report, comparison=compare(time_plan(report.used), against))
    if as_json:
        typer.echo(json.dumps(reports.as_json(report), indent=2, allow_nan=False))
        return
    from gkd.monitor import make_console

    reports.render(report, make_console())


def _devices(gpu: str, gpus: int | None, nodes: int | None, measure: bool) -> tuple[Device, int]:
    """The device, with --nodes and --measure in it, and how many."""
    from gkd.planning.devices import device_named

    device = device_named(gpu)
    if measure:
        if not device.is_cpu:
            raise ConfigError(f"--measure: measures this machine's CPU, not {gpu!r}; add --gpu cpu")
        from gkd.planning.measure import measured

        device = measured(device)
    for name, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} must be at least 1")
    if nodes is None:
        return device, gpus or 1
    devices = gpus or nodes * device.devices_a_node
    if devices % nodes:
        raise ConfigError(f"--gpus: {devices} is not a multiple of --nodes {nodes}")
    return replace(device, devices_a_node=devices // nodes), devices


def _with_sweeps(report: Report, plot: Path | None) -> Report:
    from gkd.planning.sweep import plot as draw
    from gkd.planning.sweep import sweep

    sweeps = tuple(sweep(report.used, mode) for mode in ("fixed batch", "batch grows"))
    if plot is not None:
        try:
            draw(sweeps, plot)
        except ImportError:
            raise ConfigError("--plot: needs matplotlib; run `pip install 'gkd[plots]'`") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot: {plot}: {error}") from None
    return replace(report, sweeps=sweeps)
