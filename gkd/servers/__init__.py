"""`gkd serve-teacher` and `gkd serve-sampler`. Their clients, in other rooms, import nothing of this one."""
