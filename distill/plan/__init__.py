"""`tutelage plan`: the steps, tokens and memory that a config would take."""
