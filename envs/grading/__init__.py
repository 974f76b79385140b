"""Whether a response equals the gold answer: `grade` says so, `judge` says why too.

verdict    the answer in a response, and the three tiers that compare it, cheapest first
text       TeX and Unicode as one plain TeX; split, syntax: its parts, its expressions as trees
shapes     what kind of answer it is; kinds, sets, values compare each; numbers, units
exact      values as fractions; algebra, by high precision; arithmetic, what both must answer
pool       the processes of the symbolic tier; worker, what runs in them
"""

from tutelage.envs.grading.verdict import MAX_ANSWER, Verdict, extract, grade, judge

__all__ = ["MAX_ANSWER", "Verdict", "extract", "grade", "judge"]
