"""Distillation from hidden states, without logits of the whole batch."""
