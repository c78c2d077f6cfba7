"""Ranks: the process group, how they are started, what ZeRO does, and who watches for a hang."""
