"""Tiny models that ship with the package: `builtin:start`, `builtin:household`, `builtin:arithmetic`.

The recipes that made them are configs/tiny/*.yaml; tokenizer.py makes the tokenizer that they share.
"""
