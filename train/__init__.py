"""Stage 2: shards -> LoRA."""
