"""Everything that the stages agree on: cache, model conventions, config, seeding, console."""
