"""Ranks: process group and launch, collectives, ZeRO, and the watchdog."""
