"""A linear layer read from packed signs and scales."""
