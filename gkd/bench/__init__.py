"""`gkd bench table`: ways to distil, compared on tasks that a program checks."""
