"""Training: the trainer, its step, and the components it is built from."""
