"""gkd serve-environment"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gkd.cli.serving import Port
from gkd.config import make_section
from gkd.errors import ConfigError, MachineError

PORT = 8500


def serve_environment_command(
    kind: Annotated[str, typer.Argument(help="answer, calculator, text_game, or a plugin's.")],
    options: Annotated[str, typer.Option(help="JSON of the kind's keys, e.g. '{\"sides\": 20}'.")] = "{}",
    plugin: Annotated[list[str] | None, typer.Option(help="Installed module that registers the kind.")] = None,
    port: Port = PORT,
) -> None:
    """Serve an environment on this machine, to training runs with `environment: {kind: http}`.

    Runs until Ctrl-C or SIGTERM.
    """
    from gkd.environments import ENVIRONMENTS
    from gkd.plugins import load_plugins
    from gkd.servers.environment import EnvironmentServer

    load_plugins(list(plugin or ()))
    if kind not in ENVIRONMENTS:
        raise ConfigError(f"gkd serve-environment: {ENVIRONMENTS.explain(kind)}")
    try:
        values = json.loads(options)
        server = EnvironmentServer(make_section(ENVIRONMENTS[kind], {**values, "kind": kind}, "--options"), port)
    except (TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--options: not a JSON object: {error}") from None
    except OSError as error:
        raise MachineError(f"--port: {port} cannot be listened on ({error.strerror}); choose another") from None
    with server:
        typer.echo(f"{kind} listens at {server.address}")
        server.serve_forever()
