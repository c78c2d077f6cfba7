"""Build shards from source images: list, plan, write, check."""
