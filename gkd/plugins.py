"""Modules of a user's own that a config names, and what they call to add their parts.

    # in an installed module, say my_distillation.py
    from gkd.plugins import register_term
    register_term("my_term", MyTerm)

    # in the config
    plugins: [my_distillation]

They are imported before a config is checked, in every process that reads one.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import ConfigError

if TYPE_CHECKING:
    from gkd.environments import EnvironmentKind
    from gkd.objectives.closed_forms import Definition
    from gkd.objectives.terms import Term
    from gkd.objectives.token_weights import TokenWeight
    from gkd.registry import Drawn
    from gkd.schedules import Shape


def register_term(kind: str, term: type[Term]) -> None:
    """Makes `kind` a term of an objective."""
    from gkd.objectives.terms import TERMS

    TERMS.register(kind, term)


def register_token_weight(name: str, weight: type[TokenWeight]) -> None:
    """Makes `name` a key of a term's `token_weight`."""
    from gkd.objectives.token_weights import TOKEN_WEIGHTS

    TOKEN_WEIGHTS.register(name, weight)


def register_divergence(kind: str, definition: Definition) -> None:
    """Makes `kind` a divergence of `gkd.divergence` and its kin, and a term of an objective. It needs no kernel."""
    from gkd.objectives.closed_forms import register_divergence as register
    from gkd.objectives.terms import TERMS, DivergenceTerm

    if kind not in TERMS:
        register(kind, definition)
    TERMS.register(kind, DivergenceTerm)


def register_source(name: str, source: type[Any], drawn: Drawn | None = None) -> None:
    """Makes `name` a source of the mixture; a class of `gkd.rollout.sources.Source`.

    `drawn` says who draws the tokens of its texts: None is Drawn.ELSEWHERE, of texts that come back as they are.
    """
    from gkd.registry import SOURCES, Drawn

    SOURCES.register(name, source, drawn or Drawn.ELSEWHERE)


def register_environment(kind: str, environment: type[EnvironmentKind]) -> None:
    """Makes `kind` an environment that students can talk to."""
    from gkd.environments import ENVIRONMENTS

    ENVIRONMENTS.register(kind, environment)


def register_shape(name: str, shape: Shape) -> None:
    """Makes `name` a shape of schedules: from the share of the steps to the share of the way, both in [0, 1]."""
    from gkd.schedules import SHAPES

    SHAPES.register(name, shape)


def load_plugins(names: Any) -> None:
    """Imports the modules. Raises ConfigError for one that is not installed, or that cannot be imported.

    The current folder is no place for one, as it may hold a model or data: only what is installed, or what PYTHONPATH
    names, is found.
    """
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"plugins: must be a list of module names, such as [my_distillation], not {names!r}")
    for index, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise ConfigError(f"plugins.{index}: {name!r} is no name of a module")
        _load(name, f"plugins.{index}")


def _load(name: str, key: str) -> None:
    if name in sys.modules:
        return
    path = list(sys.path)
    try:
        sys.path[:] = [entry for entry in path if entry not in ("", str(Path.cwd())) or _is_asked_for(entry)]
        importlib.invalidate_caches()
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            raise ConfigError(f"{key}: no module {name!r} is installed; pip install the package that has it") from None
        raise ConfigError(f"{key}: importing {name} failed: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{key}: {name}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{key}: importing {name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = path


def _is_asked_for(entry: str) -> bool:
    return bool(entry) and entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
