"""The same distillation through gkd and through TRL's two trainers, each job in a process of its own."""
