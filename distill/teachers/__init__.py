"""Who scores, and how scores travel."""
