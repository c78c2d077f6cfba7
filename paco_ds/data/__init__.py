"""From images to two augmented views: cards, shards, order, stream, views."""
