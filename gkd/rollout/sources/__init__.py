"""Where a completion comes from: one source a file, named in `gkd.registry.SOURCES`."""

from gkd.rollout.sources.base import Scores, Source, SourceContext

__all__ = ["Scores", "Source", "SourceContext"]
