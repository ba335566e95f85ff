"""The linear layer of latent weights, as a binary layer trains."""
