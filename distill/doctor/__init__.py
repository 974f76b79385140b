"""`tutelage doctor`: looks, before a run starts, for what would silently ruin it, and names cures.

Every check is a small function on objects (a tokenizer, a model, a teacher, an environment's id)
that returns findings, so that a test can hand it a faulty one. `examination` runs them all on a
config.
"""
