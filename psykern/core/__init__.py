"""What every room may use: the hand-offs between rooms, errors, settings, and a few tools without torch."""
