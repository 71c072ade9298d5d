"""Who answers: a model in this process, or one behind a server."""

from __future__ import annotations

from pathlib import Path

import httpx

from gkd.author.authors.kept import AnswerStore, Budget, KeptAuthor
from gkd.author.authors.server import ServerAuthor
from gkd.author.questions import Author
from gkd.author.spec import RecipeForm
from gkd.config import cache_folder

_TOKENS_A_PRICE = 1e6


def store_path() -> Path:
    """Of the answers of all models."""
    return cache_folder() / "author" / "answers.sqlite"


async def open_authors(
    recipe: RecipeForm, origin: str, budget: Budget, store: AnswerStore, transport: httpx.AsyncBaseTransport | None
) -> dict[str, KeptAuthor]:
    """The models that the recipe asks, by name. Servers are tried. `transport`: in the place of the network.

    Raises ConfigError or ModelError for one that cannot be asked.
    """
    asked = dict.fromkeys(name for step in recipe.steps if step.ask for name in step.ask.models)
    authors: dict[str, KeptAuthor] = {}
    for name in asked:
        form, key = recipe.models[name], f"{origin}: models.{name}"
        author: Author
        if form.address is not None:
            author = ServerAuthor(form, key, budget.check, transport)
            await author.check()
        else:
            from gkd.author.authors.local import LocalAuthor

            author = LocalAuthor(form, key)
        prices = form.prices
        of_a_token = (prices.prompt / _TOKENS_A_PRICE, prices.completion / _TOKENS_A_PRICE) if prices else (0.0, 0.0)
        authors[name] = KeptAuthor(author, store, recipe.seed, budget, of_a_token)
    return authors
