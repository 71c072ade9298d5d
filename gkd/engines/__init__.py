"""vLLM: started, asked, given weights, and driven by a thread. Nothing outside of this room imports it."""
