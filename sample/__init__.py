"""Videos from prompts and adapters, and from the latents that training saved as previews."""
