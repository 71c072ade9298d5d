"""Several runs, one after the other, each made of what those before it brought: `gkd chain`."""

from gkd.chain.run import run_chain
from gkd.chain.spec import Chain, Reference, Stage, read_chain

__all__ = ["Chain", "Reference", "Stage", "read_chain", "run_chain"]
