"""Memory of each setting on the card, and the choice of a plan."""
