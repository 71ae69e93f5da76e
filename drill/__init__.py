"""Drills: break one thing at random moments, from a printed seed, and count every answer by its id."""
