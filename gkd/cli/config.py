"""gkd config"""

from __future__ import annotations

import typer

from gkd.config import describe_keys


def config_command() -> None:
    """Print every config key with its default and meaning."""
    rows = describe_keys()
    width = max(len(path) for path, _, _ in rows)
    for path, default, description in rows:
        typer.echo(f"{path:<{width}}  {description}  [{default}]")
