"""Every key of a config: plain data, read once, checked whole, before anything heavy loads."""
