"""Plan a recipe on a number of ranks before a run: memory, traffic, legal settings, time."""
