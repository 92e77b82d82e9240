"""What the packages know of CogVideoX checkpoints."""
