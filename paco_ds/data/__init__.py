"""From images to augmented views: cards, shards, order, stream, views."""
