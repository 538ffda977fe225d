"""Tables of recipes × seeds: run, resumed, summed up beside published numbers."""
