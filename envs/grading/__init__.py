"""Whether a response equals the gold answer: `grade` says so, `judge` says why too.

verdict    extracts the answer from a response and compares it in three tiers, cheapest first
text       rewrites TeX and Unicode as one plain TeX; split takes it apart, syntax makes trees of it
shapes     finds out what kind of answer it is; kinds, sets, values compare each; numbers, units
exact      values as fractions; algebra: values of high precision; arithmetic: what both provide
pool       the processes of the symbolic tier; worker: what runs in them

In all of them `mine` is what was read from the answer, `theirs` what was read from the gold.
"""

from tutelage.envs.grading.verdict import MAX_ANSWER, Verdict, extract, grade, judge

__all__ = ["MAX_ANSWER", "Verdict", "extract", "grade", "judge"]
