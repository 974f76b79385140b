"""`tutelage doctor`: what silently ruins a run, looked for before it starts, each with its cure.

Every check is a small function on objects (a tokenizer, a model, a teacher, an environment's id)
that returns findings, so that a test can hand it a sick one. `examination` runs them all on a
config.
"""
