"""Recognises the units that may follow a number, and which spellings mean the same unit.

A word that is not listed here is no unit: `5 million` is not 5, `7 is not a solution` is not 7.
"""

from __future__ import annotations

import re
from fractions import Fraction

from tutelage.envs.grading.text import TEXT

# Chinese classifiers: the thing that is counted may follow (个苹果).
CLASSIFIERS = (
    "个 次 人 种 名 位 只 支 条 件 棵 本 页 张 台 辆 颗 头 匹 朵 把 双 套 组 队 枚 根 "
    "间 盒 箱 袋 瓶 杯 户 座 层 倍 套 道 题 步 項 项 对 级"
)
_QUALIFIED = re.compile(
    "[上下多少不非左右或和半以百千万亿零一二两三四五六七八九十]"
)  # 个以上, 个半

# One unit a line: its name, then the other spellings. A regular plural needs no entry.
_SPELLINGS = f"""
metre meter m 米 公尺
centimetre centimeter cm 厘米 公分 cms
millimetre millimeter mm 毫米
kilometre kilometer km 千米 公里 kms
decimetre decimeter dm 分米
micrometre micrometer micron um
nanometre nanometer nm 纳米
inch inches in 英寸
foot feet ft 英尺
yard yd yds 码
mile mi 英里
nautical-mile
light-year ly lightyear
angstrom
parsec pc
AU au
gram g 克 gm gramme
kilogram kg 千克 公斤 kgs kilo kilogramme
milligram mg 毫克
tonne ton 吨 t
pound lb lbs 磅
ounce oz 盎司
stone
litre liter l L 升
millilitre milliliter ml mL 毫升 cc
gallon gal 加仑
quart qt
pint pt
cup
teaspoon tsp
tablespoon tbsp
second sec s 秒 secs 秒钟
millisecond ms msec 毫秒
microsecond
nanosecond ns
minute min 分钟 mins
hour hr h 小时 hrs 时
day 天 日
week wk 周 星期
month 月 个月 mo
year yr 年 yrs
decade
century centuries
old
岁
degree deg degrees 度
radian rad rads
degree-C 摄氏度
degree-F
kelvin K
newton N 牛
joule J
kilojoule kJ
watt W 瓦
kilowatt kW
megawatt MW
volt V
millivolt mV
kilovolt kV
ampere A amp amps
milliampere mA
ohm
kilohm
coulomb C
microcoulomb
farad F
tesla T
gauss G
weber Wb
henry H henries
hertz Hz
kilohertz kHz
megahertz MHz
gigahertz GHz
pascal Pa
kilopascal kPa
atmosphere atm
bar
torr
mole mol
calorie cal
kilocalorie kcal
electronvolt eV
keV
MeV
GeV
erg
dyne
lumen lm
solar-mass
solar-luminosity
solar-radius
decibel dB
ppm
ppb
horsepower hp
bit
byte B
kilobyte KB kB
megabyte MB
gigabyte GB
acre
hectare ha
unit un 单位
dollar dollars USD usd $ 美元 buck
cent cents ¢ 美分
euro EUR €
british-pound £ GBP
yen JPY ¥ 日元
yuan RMB CNY 元 人民币 块
jiao 角
rupee rupees ₹ Rs INR
peso
penny pennies pence
nickel
dime
quarter-coin
mph
kmh kph
rpm
knot
{CLASSIFIERS}
way
people person persons
"""
# Things that problems count: each is a unit of its own.
_COUNTED = """
apple orange banana pear peach lemon cherry grape berry strawberry blueberry fruit tomato potato
carrot egg cookie cupcake cake pie pizza slice candy candies chocolate sandwich sandwiches donut
muffin loaf loaves bread meal snack student teacher child children kid boy girl man men woman
women adult player team member friend guest worker employee passenger customer family families
couple group class classes classroom school voter visitor volunteer contestant runner swimmer book
page chapter word letter letters digit number integer pencil pen crayon marker notebook paper
sheet ticket coin bill stamp card sticker poster picture photo photograph painting marble ball
balloon toy doll bead block cube square triangle rectangle circle polygon line segment point
vertex vertices edge face side corner diagonal region intersection solution root zero value
possibility possibilities outcome choice option arrangement permutation combination pair set
subset triple tuple sequence term factor divisor multiple prime element function polynomial path
route step move turn game match matches round trial time times lap tournament car truck bus buses
bike bicycle train plane boat ship wheel vehicle house home room apartment building floor door
window chair table desk seat bench row column box boxes bag basket bottle can jar carton crate
case package packet bunch bouquet flower rose tulip tree plant seed leaf leaves animal dog puppy
puppies cat kitten cow horse pig sheep goat chicken duck bird fish rabbit frog bug ant bee
butterfly butterflies spider shirt dress dresses shoe sock hat glove coat shoes pants jacket
button gift present prize vote message email call minute-mark question problem exercise answer
test quiz quizzes exam score goal shot run mark song movie video episode show shelf shelves
bookshelf stair dot tile brick stone stick rope ribbon yarn wire pole post fence flag candle lamp
bulb battery batteries computer phone device file key lock piece part section portion serving
batch dozen-egg pack roll stack pile handful item object thing good product order job task project
shift trip visit flight cell bacterium bacteria molecule atom electron proton photon star planet
ring pearl jewel necklace bracelet earring diamond star-fish shell rock pebble grain drop bucket
pail gallon-jug tank calculator magazine newspaper dvd cd disc record plate bowl spoon fork knife
knives napkin glass glasses mug tray towel blanket pillow bed sofa curtain tuna crab lobster
oyster turtle lizard snake monkey elephant lion tiger bear wolf wolves deer fox foxes squirrel
mouse mice hamster pet clown acrobat soldier sailor pirate ninja knight queen king bishop rook
pawn chess-piece dog-biscuit treat calorie-bar chip pretzel cracker peanut nut almond pecan walnut
mile-marker signature page-turn different distinct possible unique ordered valid beads inning
quarter touchdown dap dance instrument
"""
_WORDS: dict[str, str] = {}
for _line in _SPELLINGS.split("\n"):
    _names = _line.split()
    for _word in _names:
        _WORDS.setdefault(_word, _names[0])  # the first line that has a word decides
for _word in _COUNTED.split():
    _WORDS.setdefault(_word, _word)

# Units of several words become one word, and what joins units becomes / or *.
_PHRASES = tuple(
    (re.compile(pattern, re.IGNORECASE), to)
    for pattern, to in (
        (r"\^\s*\\circ\s*", " degree-"),
        (r"degree-\s*(?=[CF]\b)", "degree-"), (r"degree-(?![CF]\b)", "degree "),
        (r"\bdegrees?\s+(?:celsius|centigrade)\b", "degree-C"), (r"\bcelsius\b", "degree-C"),
        (r"\bdegrees?\s+fahrenheit\b", "degree-F"), (r"\bfahrenheit\b", "degree-F"),
        (r"\b(?:miles\s+per\s+hour|mph|mi\s*/\s*hr?)\b", "mile/hour"),
        (r"\b(?:kmh|kph)\b", "km/hour"), (r"\brpm\b", "revolution/minute"),
        (r"\bnautical\s+miles?\b", "nautical-mile"), (r"\blight[\s-]+years?\b", "light-year"),
        (r"\b(?:u\.?s\.?\s*)?dollars?\b", "dollar"), (r"\bus\s*\\?\$", "dollar"),
        (r"\\?\$", " dollar "),
        (r"\byears?\s+old\b|\byears?\s+of\s+age\b|\byear-old\b", "year"),
        (r"^\s*'\s*$", "foot"), (r"^\s*(?:\"|'')\s*$", "inch"),
        (r"\bsolar\s+mass(?:es)?\b", "solar-mass"),
        (r"M\s*_\s*\{?\s*\\odot\s*\}?", "solar-mass"),
        (r"L\s*_\s*\{?\s*\\odot\s*\}?", "solar-luminosity"),
        (r"R\s*_\s*\{?\s*\\odot\s*\}?", "solar-radius"),
        (r"\\Omega\b", "ohm"), (r"k\s*\\Omega\b", "kilohm"),
        (r"\\mu\s*(?=[a-zA-Z])", "micro"), (r"\bmicrom\b", "micrometre"),
        (r"\bmicros\b", "microsecond"),
        (r"\bmicroC\b", "microcoulomb"), (r"\bmicrog\b", "microgram"),
        (r"\bmicroF\b", "microfarad"),
        (r"平方", "square "), (r"立方", "cubic "), (r"每", "/"),
        (r"\bper\b", "/"), (r"\bby\b", "*"),
    )
)  # fmt: skip
_WORDS |= {name: name for name in ("revolution", "microgram", "microfarad")}

_FACTOR = re.compile(
    r"((?:square|sq|cubic|cu)(?![A-Za-z])\.?)?\s*([A-Za-z]+(?:-[A-Za-z]+)?|[¢€£¥₹$]|[一-鿿]+)\.?"
    r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?|\s+(squared|cubed))?",
)
_PREFIXES = {
    "f": "femto", "p": "pico", "n": "nano", "m": "milli", "c": "centi", "d": "deci", "k": "kilo",
    "M": "mega", "G": "giga", "T": "tera",
}  # fmt: skip
_PREFIXED = re.compile(
    rf"({'|'.join(_PREFIXES)})(m|g|s|Hz|Pa|W|J|V|A|N|C|F|T|H|Wb|eV|L|mol|ohm|cal|pc|bar|bit|B)$"
)
_LONGEST = 60  # characters of a unit

# Words that multiply the number, and by how much.
SCALES: dict[str, int | Fraction] = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
    "half": Fraction(1, 2), "halves": Fraction(1, 2), "third": Fraction(1, 3),
    "quarter": Fraction(1, 4), "fourth": Fraction(1, 4), "fifth": Fraction(1, 5),
    "sixth": Fraction(1, 6), "seventh": Fraction(1, 7), "eighth": Fraction(1, 8),
    "ninth": Fraction(1, 9), "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
}  # fmt: skip
_SCALE = re.compile(
    rf"^(.*\d)[\s{TEXT}-]*({'|'.join(sorted(SCALES, key=len, reverse=True))})s?$", re.DOTALL
)


def canonical(text: str) -> str | None:
    """One name for every spelling of a unit, or None if `text` is none: `km per hr` and `km/h`."""
    text = text.replace(TEXT, " ").strip()
    if not text or len(text) > _LONGEST:
        return None
    for pattern, to in _PHRASES:
        text = pattern.sub(to, text)
    powers: dict[str, int] = {}
    text = text.strip()
    at, sign = (1, -1) if text.startswith("/") else (0, 1)  # per month
    while at < len(text):
        match = _FACTOR.match(text, at)
        if match is None or (name := _name(match[2])) is None:
            return None
        prefix = (match[1] or "").rstrip(".").lower()
        power = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}.get(prefix, 1)
        power *= {"squared": 2, "cubed": 3}.get(match[4] or "", int(match[3] or 1))
        powers[name] = powers.get(name, 0) + sign * power
        at = match.end()
        joint = re.compile(r"[\s{}()]*([*/]?)[\s{}()]*").match(text, at)
        assert joint is not None
        sign = -1 if joint[1] == "/" else sign if joint[1] == "*" or sign == -1 else 1
        at = joint.end()
    return "*".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power)


def _name(word: str) -> str | None:
    """The unit of one word, its case, plural and full stop aside."""
    for said in (word, word.lower() if len(word) > 2 else word):
        for form in (
            said,
            said.removesuffix("s") if len(said) > 3 else said,
            said.removesuffix("es"),
        ):
            if form in _WORDS:
                return _WORDS[form]
    if match := _PREFIXED.match(word):
        return _PREFIXES[match[1]] + _WORDS[match[2]]
    if word[0] in CLASSIFIERS and len(word) <= 6 and not _QUALIFIED.search(word):
        return _WORDS[word[0]]  # 12 个苹果
    if len(word) > 4 and word.endswith("ies"):
        return _WORDS.get(word[:-3].lower() + "y")
    return None


_START = re.compile(
    rf"(?<=[\d}})\]!.|万亿千百])[\s{TEXT}]*(?=[A-Za-z¢€£¥₹$\\一-鿿^'\"{TEXT}])|[\s{TEXT}]+(?=[A-Za-z¢€£¥₹$\\一-鿿])"
)
_MONEY = re.compile(
    r"^([+-]?)\s*(?:US|USD|U\.S\.)?\s*(\\?\$|[€£¥₹]|USD|EUR|RMB|Rs\.?|CNY|GBP)\s*(?=[\d.+\\-])"
)


_LETTERS = re.compile(r"^(?:[A-Za-z](?:\s*\^\s*\{?-?\d\}?)?(?:[\s*/]+|$))+$")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])(?![eE][+-]?\d)[A-Za-z]")


def split(text: str) -> tuple[str, str, bool]:
    """(the value, its unit, whether the unit is one bare letter, which may be a variable).

    The unit is "" where there is none.
    """
    if money := _MONEY.match(text):
        rest, unit, _ = split(money[1] + text[money.end() :])
        return rest, unit or canonical(money[2]) or "", False
    for start in _START.finditer(text, max(0, len(text) - _LONGEST)):
        core, tail = text[: start.start()].rstrip(), text[start.end() :]
        bare = (
            len(tail.strip()) == 1
            and TEXT not in start.group()
            and tail.isalpha()
            and tail.isascii()
        )
        if not core or (bare and not start.group()) or core[-1:] in "+-*/^_=<>,([{\\":
            continue
        if _inside(core) or (_LETTERS.match(tail) and _VARIABLE.search(core)):
            continue  # in v t - \\frac12 g t^2 these are no grams
        if (found := canonical(tail)) is not None:
            return core, found, bare
    return text, "", False


def _inside(core: str) -> bool:
    """Whether a bracket is open at its end: what follows is then no unit of the whole."""
    return core.count("{") != core.count("}") or core.count("(") > core.count(")")


def scaled(text: str) -> tuple[str, Fraction]:
    """(`2.5`, 1000000) of `2.5 million`."""
    if match := _SCALE.match(text):
        return match[1], Fraction(SCALES[match[2]])
    return text, Fraction(1)
