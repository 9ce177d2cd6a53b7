"""LoRA methods side by side on AG News, and claims that papers dispute as paired contrasts."""
