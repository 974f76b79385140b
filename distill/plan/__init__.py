"""What a config would take."""
