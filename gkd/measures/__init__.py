"""What a run measures of its student beside the loss: the held-out divergence, and answers to be looked at."""
