"""Tiny models that ship with the package: builtin:start, builtin:household, builtin:arithmetic.

configs/tiny/*.yaml are the recipes that made them; tokenizer.py makes the tokenizer they share.
"""
