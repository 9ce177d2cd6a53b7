"""Accuracy against epsilon: one sum of clipped updates a round, for several kinds of LoRA."""
