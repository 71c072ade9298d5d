"""A teacher, which may be nothing but an API, as the author of training data: `gkd author`."""

from gkd.author.made import Made
from gkd.author.paths import card_path, page_path
from gkd.author.recipe import Recipe
from gkd.author.run import AuthorRun

__all__ = ["AuthorRun", "Made", "Recipe", "card_path", "page_path"]
