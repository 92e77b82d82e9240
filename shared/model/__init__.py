"""Facts about CogVideoX checkpoints."""
