"""Long-tailed image recognition with PaCo at cluster scale."""

__version__ = "0.11.0"
