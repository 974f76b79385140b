"""The student: one update, and who owns its weights."""
