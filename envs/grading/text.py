"""Rewrites an answer, in whatever Unicode and TeX it is written, as a small, plain TeX.

Every rewrite keeps the meaning. The result has no style commands, no math delimiters and no thin
spaces, only ASCII digits and operators, `\\frac` for every fraction command, and TEXT before words
that stood in `\\text{}` (a lone `m` is a metre there, and a variable elsewhere). A row break of a
matrix is ROW, so that no rule for spaces can remove half of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

ROW = "\ue000"  # private characters: no answer holds them, and `\\s` does not match them
TEXT = "\ue001"

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢₓₖₐ", "0123456789+-=()nixka", strict=True))
GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma_",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "chi",
    "psi",
    "omega",
]
"""The small letters in the order of Unicode; `sigma_` is the one at a word's end."""
_CHARACTERS = {
    **{chr(0x3B1 + at): f"\\{name} " for at, name in enumerate(GREEK) if name != "sigma_"},
    **{
        letter: f"\\{name} "
        for letter, name in zip(
            "ΓΔΘΛΞΠΣΦΨΩϕϑ",
            "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi theta".split(),  # noqa: SIM905
            strict=True,
        )
    },
    "Ω": "\\Omega ", "µ": "\\mu ",  # the ohm and micro signs
    **dict.fromkeys("−–—‐‑﹣－", "-"),
    **dict.fromkeys("×⋅·∙•∗✕", "*"),
    **dict.fromkeys("∕⁄／", "/"),
    **dict.fromkeys("。．", "."),
    **dict.fromkeys("，、﹐", ","),
    **dict.fromkeys("；﹔", ";"),
    **dict.fromkeys("“”„″", '"'), **dict.fromkeys("‘’′`", "'"),
    "÷": "/", "±": "\\pm ", "∓": "\\mp ", "∞": "\\infty ",
    "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≦": "\\le ", "≧": "\\ge ",
    "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv ", "∈": "\\in ", "∪": "\\cup ",
    "∩": "\\cap ", "∖": "\\setminus ", "∅": "\\emptyset ", "⌀": "\\emptyset ", "…": "\\ldots ",
    "⋯": "\\ldots ", "°": "^\\circ ", "º": "^\\circ ", "˚": "^\\circ ",
    "℃": "^\\circ C", "℉": "^\\circ F", "∠": "\\angle ", "△": "\\triangle ", "⟨": "\\langle ",
    "⟩": "\\rangle ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℚ": "\\mathbb{Q}", "ℕ": "\\mathbb{N}",
    "ℂ": "\\mathbb{C}", "∧": " and ", "∨": " or ", "→": "\\to ", "⇒": "\\Rightarrow ",
    "∴": "", "√": "\\sqrt ", "∛": "\\sqrt[3] ", "∜": "\\sqrt[4] ", "¬": "\\neg ",
    "￥": "¥", "【": "[", "】": "]", "「": "", "」": "", "或": " or ", "和": " and ", "且": " and ",
}  # fmt: skip
_INVISIBLE = re.compile(
    "[\ue000\ue001\u200b-\u200f\u2060-\u2064\ufeff\u00ad\u202a-\u202e\u2066-\u2069]"
)
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-zπ])")  # a Unicode root takes a whole number
_FRACTION = re.compile(r"(\d+)⁄(\d+)")


def _runs(text: str, table: dict[str, str], mark: str) -> str:
    """`10⁻³` becomes `10^{-3}`."""
    run = f"[{''.join(table)}]+"
    return re.sub(run, lambda m: f"{mark}{{{''.join(table[c] for c in m.group())}}}", text)


def _vulgar(character: str) -> str:
    """`½` becomes a `\\frac`; any other character stays."""
    whole = unicodedata.normalize("NFKC", character) if character not in "⁄∕" else character
    match = _FRACTION.fullmatch(whole)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else character


def _ascii(text: str) -> str:
    """Unicode mathematics in TeX; full-width and styled letters and digits plain."""
    text = _INVISIBLE.sub("", text)
    text = _runs(_runs(text, _SUPERSCRIPTS, "^"), _SUBSCRIPTS, "_")
    text = _ROOT.sub(r"\1{\2}", text)
    # These three stand for nothing, which `or` would take for a missing entry. Fractions come
    # before NFKC, which would write 2½ as 21⁄2.
    text = "".join(_CHARACTERS.get(c) or _vulgar(c) if c not in "∴「」" else "" for c in text)
    text = unicodedata.normalize("NFKC", text)
    # NFKC makes some more of the table's characters (of an italic 𝜋, for one).
    return "".join(_CHARACTERS.get(c, c) for c in text)


_END = r"(?![A-Za-z])"
_STYLE = (
    "displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|left|right|middle"
    "|[bB]igg?[lrm]?|mathbf|mathit|mathsf|mathtt|mathnormal|mathcal|mathfrak|mathscr|boldsymbol"
    "|bm|pmb|bf|bfseries|it|sf|tt|em|emph|cal|tiny|scriptsize|footnotesize|small|normalsize|large"
    "|Large|LARGE|huge|Huge|boxed|fbox|framebox|underline|underbrace|uline|mathstrut|strut|ensuremath"
    "|checkmark|qed|blacksquare|quad|qquad|enspace|thinspace|negthinspace|hfill|noindent|centering|mathop|mathrel|mathbin"
    "|mathord|mathinner|protect|relax|unboldmath|boldmath|therefore|implies|Rightarrow|Longrightarrow"
)
_TEXT_LIKE = "text|textbf|textit|textrm|textsf|texttt|textsc|textnormal|mathrm|mbox|hbox|rm|unit|si"
_NESTED = r"(?:[^{}]|\{[^{}]*\})*"
_Rule = tuple[re.Pattern[str], "str | Callable[[re.Match[str]], str]"]


def _rules(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), to) for pattern, to in pairs)


_REWRITES = _rules(  # in this order: later rules rely on what earlier ones wrote
    (r"^\s*(\*\*\*|\*\*|\*|__|_|\"|'+)(?=[^\s*])(.*[^*\s])\1\s*$", r"\2"),  # markdown and quotes
    (r"</?(?:b|i|u|em|strong|span|sub)>", ""),
    (r"\\\\\s*(?:\[\s*[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\])?|\\cr" + _END, ROW),
    (r"\\newline" + _END, " "),
    (r"(?<=\d)\s*(?:,\s*\\!|(?:\\text)?\{\s*,\s*\})\s*(?=\d{3}(?!\d))", ""),  # 10,\!080, 10{,}080
    (r"(?<=\d)'(?=\d{3}(?!\d))", ""),  # 1'000'000
    (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ""),  # 1\,000\,000
    (r"\{\s*,\s*\}", ","),
    (r"\{\s*([.+=<>-])\s*\}", r"\1"),
    (r"\\\s+\}", r"\\}"),  # a brace that lost its backslash to a space
    (r"\\(?:left|right|middle)\s*\.", ""),
    (r"\\(?:[hv]space\*?|[hv]?phantom|label|tag\*?)\s*\{[^{}]*\}", " "),
    (r"\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}", ""),
    (r"\\(?:colorbox|fcolorbox\s*\{[^{}]*\})\s*\{[^{}]*\}", ""),
    (r"\\(?:mathbb|Bbb)\s*(?:\{\s*([RZQNC])\s*\}|([RZQNC]))" + _END, r"\\mathbb \1\2 "),
    (r"\\(?:mathbf|mathrm)\s*\{\s*([RZ])\s*\}", r"\\mathbb \1 "),  # C is a choice there
    (r"\\(?:Reals|reals|R)" + _END, r"\\mathbb R "),
    (r"(?<![c}^_])\{\s*\\rm" + _END + r"\s*([^{}]*)\}", r"\\text{\1}"),
    (rf"\\(?:{_STYLE}){_END}", " "),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (rf"\{{({_NESTED})\\over(?![A-Za-z])({_NESTED})\}}|^({_NESTED})\\over(?![A-Za-z])({_NESTED})$",
     r"\\frac{\1\3}{\2\4}"),
    (r"\\(?:[dtc]frac|nicefrac|sfrac)" + _END, r"\\frac "),
    (r"\\(?:dbinom|tbinom)" + _END, r"\\binom "),
    (r"\\(?:mathrm|operatorname|mathop|text|rm)\s*\*?\s*\{\s*(i|e|d|exp|ln|log|lg|sin|cos|cis|tan|cot|csc"
     r"|sec(?!\s*\}(?:\s*\^\s*\{?-?\d\}?)?[\s$}]*$)"  # a second, at the end
     r"|arc(?:sin|cos|tan)|sinh|cosh|tanh|gcd|lcm|max|min|det|Re|Im)\s*\}", r" \1 "),
    (r"\\(?:textdegree|degree|degrees)" + _END, r"^\\circ "),
    (r"\^\s*\{\s*\\circ\s*\}\s*|\^\s*\\circ" + _END, r"^\\circ "),
    (r"\\(?:leqslant|leqq|leq)" + _END, r"\\le "),
    (r"\\(?:geqslant|geqq|geq)" + _END, r"\\ge "),
    (r"\\(?:lt)" + _END, "<"), (r"\\(?:gt)" + _END, ">"),
    (r"\\not\s*=|\\neq" + _END + r"|(?<![\d)!])!=", r"\\ne "),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"==|:=|\\coloneqq", "="),
    (r"\\(?:times|cdot|ast|bullet)" + _END, "*"),
    (r"\\div" + _END, "/"),
    (r"\\(?:varnothing|O|empty|emptyset)" + _END, r"\\emptyset "),
    (r"\\\{\s*\\\}|\{\s*\\emptyset\s*\}", r"\\emptyset "),
    (r"\\(?:[dlc]dots|dotsc|dotsb|dots)" + _END + r"|\.\.\.+", r"\\ldots "),
    (r"\\(?:lvert|rvert|vert|mid)" + _END, "|"), (r"\\[|]|\\(?:lVert|rVert|Vert)" + _END, r"\\|"),
    (r"\\(?:lbrace)" + _END, r"\\{"), (r"\\(?:rbrace)" + _END, r"\\}"),
    (r"\\(?:lbrack)" + _END, "["), (r"\\(?:rbrack)" + _END, "]"),
    (r"\\(?:lparen)" + _END, "("), (r"\\(?:rparen)" + _END, ")"),
    (r"\\colon" + _END, ":"), (r"\\(?:backslash|smallsetminus)" + _END, r"\\setminus "),
    (r"\\(?:land|wedge)" + _END, " and "), (r"\\(?:lor|vee)" + _END, " or "),
    (r"\\var(epsilon|theta|phi|rho|sigma|kappa)" + _END, r"\\\1 "),
    (r"\\(?:plusmn)" + _END + r"|\+/-|\+-(?=\d)", r"\\pm "),
    (r"\\(?:prime)" + _END, "'"), (r"\^\s*\{?\s*(')\s*\}?", r"\1"),
    (r"\\(?:ohm)" + _END, r"\\Omega "), (r"\\(?:pounds|textsterling)" + _END, "£"),
    (r"\\(?:euro|texteuro|EUR)" + _END, "€"),
    (r"\\(?:yen|textyen)" + _END, "¥"), (r"\\(?:textdollar)" + _END, r"\\$"),
    (rf"\\(?:{_TEXT_LIKE})\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", rf" {TEXT}\1 "),
    (rf"\\(?:{_TEXT_LIKE}){_END}", " "),
    (r"\*\*", "^"),
    (rf"(?<=\d)[\s{TEXT}]+squared\s*$", "^2"), (rf"(?<=\d)[\s{TEXT}]+cubed\s*$", "^3"),
    (r"(?<![\\A-Za-z])(?:infty|infinity|inf)" + _END, r"\\infty "),
    (rf"(?<=[\dA-F])[\s{TEXT}]*\(?[\s{TEXT}]*(?:in\s+)?base[\s{TEXT}-]*(\d+|[a-z]+)[\s{TEXT})]*$",
     r"_\1"),
    (rf"(?<=\d)[\s{TEXT}]+factorial\s*$", "!"),
    (rf"(?<=\d)(?:\s*\^\s*\{{[\s{TEXT}]*(?:st|nd|rd|th)\s*\}}|\^?[\s{TEXT}]*(?:st|nd|rd|th))(?=[\s}}]*$)",
     ""),  # 4^{\text{th}}
    (r"\\[!,;:> ]|\\\s|~|\\/", " "),
    (r"\\([()\[\]])", ""),
    (r"\\([_&#])", r"\1"),
    (r"\s+", " "),
)  # fmt: skip
_GAP = rf"[\s{TEXT}]*"
_SMALL = r"(?:\{\s*(\d{1,4})\s*\}|(\d))"
# How many choices: C_{10}^3, {}_{10}C_3, {}^{10}C_3, 10C3; and in order: A_5^2, P_5^2, 5P2
_CHOSEN = re.compile(
    rf"(?<![A-Za-z])([CAP]){_GAP}(?:_\s*{_SMALL}\s*\^\s*{_SMALL}|\^\s*{_SMALL}\s*_\s*{_SMALL})(?![!\d])"
    rf"|(?:\{{\s*\}})?\s*[_^]\s*{_SMALL}{_GAP}([CP]){_GAP}_\s*{_SMALL}"
    rf"|(?<![\w.,^_{{])(\d{{1,4}})([CP])(\d{{1,4}})(?![\w.,])"
)


def _chosen(match: re.Match[str]) -> str:
    """The number of choices as a binomial or a quotient of factorials; unchanged if k > n."""
    letter, *numbers = sorted(filter(None, match.groups()), key=str.isdigit)
    n, k = map(int, numbers)
    if match[1] and match.group().find("_") > match.group().find("^"):
        n, k = k, n
    if k > n:
        return match.group()
    return f"\\binom{{{n}}}{{{k}}}" if letter == "C" else f"\\frac{{{n}!}}{{{n - k}!}}"


# An interval as it is written in French: ]0, 1[ or [0, 1[
_OUTWARD = re.compile(r"([\[\]])([^\[\](){},;]*\S\s*[,;]\s*[^\s\[\](){},;][^\[\](){},;]*)([\[\]])")


def _inward(match: re.Match[str]) -> str:
    return f"{'(' if match[1] == ']' else '['}{match[2]}{')' if match[3] == '[' else ']'}"


_PAIRED_DOLLARS = re.compile(r"(?<!\\)\$([^$]*)(?<!\\)\$")
_ENDS = ".,;:。 \ue000"


def clean(text: str) -> str:
    """`text` in the plain TeX that every later step reads."""
    text = _ascii(text)
    if text.count("$") - text.count("\\$") > 1:  # math delimiters, not money
        text = _PAIRED_DOLLARS.sub(r" \1 ", text)
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    text = _CHOSEN.sub(_chosen, text)
    if text.startswith("]") or text.endswith("["):
        text = _OUTWARD.sub(_inward, text)
    return stripped(repeating(text))


def stripped(text: str) -> str:
    """Without what surrounds an answer: spaces, a full stop, one pair of braces, `=` or `:`."""
    while True:
        before = text
        text = text.strip().rstrip(_ENDS).lstrip(" =:;,\ue000")
        if text.startswith("{") and _closes(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text.startswith(TEXT):
            text = text[1:]
        if text == before:
            return text


def _closes(text: str, begin: int) -> int:
    """Where the brace at `begin` closes, or -1."""
    depth, at = 0, begin
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return -1


# --- repeating decimals --------------------------------------------------------------------------

_OVERLINE = re.compile(
    r"(?<![\d.])(\d*)\s*\.\s*(\d*)\s*\\(?:overline|bar)\s*(?:\{\s*(\d+)\s*\}|(\d))"
)
_DOTTED = re.compile(
    r"(?<![\d.])(\d*)\s*\.\s*(\d*)\s*\\dot\s*(?:\{\s*(\d)\s*\}|(\d))"
    r"(?:\s*(\d*)\s*\\dot\s*(?:\{\s*(\d)\s*\}|(\d)))?"
)
_ELLIPSIS = re.compile(r"(?<![\d.])(\d*)\.(\d*?)(\d+?)(\3+)\s*\\ldots\s*$")


def repeating(text: str) -> str:
    """Every notation of a repeating decimal as `0.1(6)`.

    `0.1666...` is one only if its last digits repeat a block; a block of one digit must stand three
    times, or twice right after the point (0.33...), since 2.7182818... is no fraction.
    """
    text = _OVERLINE.sub(lambda m: f"{m[1] or 0}.{m[2]}({m[3] or m[4]})", text)
    text = _DOTTED.sub(
        lambda m: f"{m[1] or 0}.{m[2]}({m[3] or m[4]}{m[5] or ''}{m[6] or m[7] or ''})", text
    )
    match = _ELLIPSIS.search(text) if len(text) < 60 else None  # the pattern backtracks
    if match and (len(match[3]) > 1 or len(match[4]) > 1 or not match[2]):
        text = f"{text[: match.start()]}{match[1] or 0}.{match[2]}({match[3]})"
    return text
