"""What the stages agree on: the cache, shapes, variants, configuration, seeding, console."""
