"""Prompt (+ image) + LoRA -> mp4."""
