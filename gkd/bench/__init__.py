"""`gkd bench`: ways to distil, compared, on tasks that a program checks (here) and on text (`text`)."""
