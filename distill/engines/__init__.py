"""Who generates: the student's rollout engines."""
