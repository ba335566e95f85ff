"""A dense linear layer of one token on a GPU."""
