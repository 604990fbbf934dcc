"""The critical pair of a rope, by experiment and in theory."""
