"""The frozen transformer with its adapter: forward over packs, memory levels, streaming."""
