"""Keys to contrast with: the momentum encoder, the shuffle of its images between ranks, the queue."""
