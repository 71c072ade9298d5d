"""What `gkd_table.py` compares the ways to distil with: tasks, models, methods, cells, scores, statistics."""
