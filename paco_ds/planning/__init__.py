"""What a recipe will need on a number of ranks, before there are any: memory, traffic, legal settings, time."""
