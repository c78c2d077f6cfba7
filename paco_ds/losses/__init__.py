"""Owns the training losses: parametric contrastive learning and what it is compared with."""
