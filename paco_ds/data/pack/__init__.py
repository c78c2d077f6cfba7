"""From source images to shards: listing, planning, writing, checking."""
