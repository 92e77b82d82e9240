"""What a setting costs on the card, and the choice of a plan."""
