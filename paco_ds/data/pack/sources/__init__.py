"""One module per kind of source. A module placed here is found by the `Card` classes in it; see `pack.card`."""
