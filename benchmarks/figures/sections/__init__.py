"""What `benchmarks.figures.tables` puts into pages: a module a kind of result, the plots, and what they share."""
