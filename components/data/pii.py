"""Personal data in text: e-mail, telephone, IP address, IBAN, card, Spanish DNI and NIE.

What has a checksum is found by it (IBAN modulo 97, cards by Luhn, DNI and NIE by their letter). What has none is found
by its form and by the words around it: nine digits after "llama al" are a telephone, after "pedido" none.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from components.data.words import points

KINDS = ("email", "phone", "ip", "iban", "card", "dni")


class Found(NamedTuple):
    """`kind` of personal data at text[start:end]."""

    start: int
    end: int
    kind: str


EMAIL = re.compile(r"[\w.%+'\-]+(?:@|\s?[\[(](?:at|arroba)[\])]\s?)(?:[\w\-]+\.)+([A-Za-z]{2,24})(?![\w@])")
FILES = re.compile(
    r"png|jpe?g|gif|svg|webp|ico|css|js|ts|py|json|html?|xml|md|txt|csv|pdf|zip|gz|so|dll|exe", re.IGNORECASE
)
LONG_NUMBER = re.compile(r"\d(?:[().\-–\u00a0 /]{0,3}\d){6,}")  # anything that may be a telephone, a card or a DNI
AT = re.compile("@")
SIGN = re.compile(r"@|[\[(](?:at|arroba)[\])]")
COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]")
IBAN_HEAD = re.compile(r"\d\d(?:[ \u00a0\-]?[A-Za-z0-9]){11}")
FOUR = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")
IPV4 = re.compile(r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d|-\d)")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){1,7}(?:::)?(?![\w:])")
VERSION = re.compile(
    r"(?:\b(?:v|ver|vers|version|versions|versión|versiones|release|build|rev|revision|revisión|python|firmware|"
    r"section|sección|apartado|capítulo|chapter|clause|cláusula|artículo|article|figure|figura|tabla|table|"
    r"updated?|upgraded?|patch|parche|kernel|driver|asn|oid)\.?:?\s*"
    r"(?:from\s+|to\s+|a\s+la\s+|number\s+|número\s+|nº\s*|no\.\s*)?(?:[\d.]+\s+(?:to|a)\s+)?"
    r"|[=~^<>]=?\s*|(?<!/)/|§\s*|[A-Za-z]-)$",
    re.IGNORECASE,
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ \u00a0\-]?[A-Za-z0-9]){11,30}(?![A-Za-z0-9])")
LENGTHS = {
    **{"NO": 15, "BE": 16, "DK": 18, "FI": 18, "NL": 18, "MK": 19, "SI": 19, "AT": 20, "BA": 20, "EE": 20, "LT": 20},
    **{"LU": 20, "XK": 20, "KZ": 20, "CR": 22, "CH": 21, "HR": 21, "LI": 21, "LV": 21, "BG": 22, "BH": 22, "DE": 22},
    **{"GB": 22, "GE": 22, "IE": 22, "ME": 22, "RS": 22, "AE": 23, "GI": 23, "IL": 23, "AD": 24, "CZ": 24, "ES": 24},
    **{"MD": 24, "PK": 24, "RO": 24, "SA": 24, "SE": 24, "SK": 24, "TN": 24, "VG": 24, "PT": 25, "IS": 26, "TR": 26},
    **{"FR": 27, "GR": 27, "IT": 27, "MC": 27, "MR": 27, "SM": 27, "AL": 28, "AZ": 28, "CY": 28, "DO": 28, "GT": 28},
    **{"HU": 28, "LB": 28, "PL": 28, "UA": 29, "BR": 29, "PS": 29, "QA": 29, "JO": 30, "KW": 30, "MU": 30, "MT": 31},
}
CARD = re.compile(r"(?<![\w.,\-])\d(?:[ \u00a0\-]?\d){12,18}(?![\w]|[.,\-]\d)")
ISSUERS = re.compile(
    r"(?:4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|(?:50|5[6-9]|6[37])\d{14})"
)
DNI = re.compile(
    r"(?<![\w.\-])(?:\d{8}|\d{2}\.\d{3}\.\d{3}|[XYZxyz][ .\-]?(?:\d{7}|\d\.\d{3}\.\d{3}))"
    r"[ \-]?[A-Za-z](?!\w)"
)
LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
GAP = r"[ \u00a0.\-–]"
PHONES = (  # whole in themselves
    re.compile(
        rf"(?<![\w+])(?:\+|00 ?)[1-9]\d{{0,2}}(?:{GAP}?\(0?\d{{0,4}}\))?(?:{GAP}{{0,2}}\d{{1,4}}){{2,6}}(?![\w]|[.,]\d)"
    ),
    re.compile(rf"(?<![\w+.\-/])(?:\+?1{GAP})?\([2-9]\d\d\){GAP}?\d{{3}}{GAP}\d{{4}}(?![\w]|-\d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )(?:1([ .\-]))?[2-9]\d\d([ .\-])\d{3}\2\d{4}(?![\w%€$]|[.,\-/]\d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )[679]\d\d([ .\-\u00a0])\d{3}\1\d{3}(?![\w%€$]|[.,\-/]\d| \d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )[679]\d\d([ .\-\u00a0])\d\d\1\d\d\1\d\d(?![\w%€$]|[.,\-/]\d| \d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )[89]\d([ .\-\u00a0])\d{3}\1\d\d\1\d\d(?![\w%€$]|[.,\-/]\d| \d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )0\d(?:([ .\-])\d\d)(?:\1\d\d){3}(?![\w%€$]|[.,\-/]\d| \d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )0[1-9]\d{1,3}[ \-]\d{3,4}[ \-]\d{3,4}(?![\w%€$]|[.,\-/]\d| \d)"),
    re.compile(r"(?<![\w+.,\-/$€£])(?<!\d )0[1-9]\d{3}[ \-]\d{6}(?![\w%€$]|[.,\-/]\d| \d)"),
)
BARE = re.compile(
    r"(?<![\w+.,\-/$€£#])\(?\d(?:[ .\-()–]{0,2}\d){6,11}(?![\w%€$]|[.,\-/]\d| \d)"
)  # after a word that says so
SAYS = re.compile(
    r"(?:\btel\b|\btlfn?o?\b|\btel[eé]f|\bphone|\bm[oó]vil|\bcell|\bmobile|\bfax\b|\bll[aá]m|\bcall(?:ing)?\b|\bwhats?app"
    r"|\bwasap|\bsms\b|\btext (?:me|us|him|her)\b|\bdial|\bring (?:me|us)\b|\bmy number\b|\bmi n[uú]mero\b|\bcontact|"
    r"\bhelpline|\bhotline|\bextensi[oó]n|\bmarca(?:r|ndo)? el|☎|📞|📱)",
    re.IGNORECASE,
)
OTHERWISE = re.compile(
    r"(?:\b(?:order|invoice|ticket|tracking|pedido|factura|referencia|ref|expediente|isbn|issn|doi|serial|serie|"
    r"n[ºo°] de|"
    r"account|a/c|cuenta|id|identifier|timestamp|code|código|part|model|modelo|sku|ean|upc|pmid|arxiv|case|caso|patent|"
    r"patente|issue|commit|error|page|página|seed|port|size|bytes|population|población|version|versión|"
    r"license|licencia|imei|vin|zip|postal|lote|batch|folio|registro|registration)\b[^\w\d]{0,4}(?:(?:number|número|no|nº|num|is|es|de|con|of)"
    r"\b[^\w\d]{0,3}){0,3})$",
    re.IGNORECASE,
)
UNITS = re.compile(
    r"\s{0,2}(?:[=*+<>]|€|%|\$|euros?\b|d[oó]lar|dollars?\b|usd\b|eur\b|pesos\b|habitantes|inhabitants|people|personas|bytes|kb\b|mb\b|"
    r"km\b|kg\b|m2\b|m²|ms\b|rows|filas|tokens|words|palabras|votes|votos|units|unidades|times|veces|pasos|steps)",
    re.IGNORECASE,
)
DATE = re.compile(
    r"(?:(?:19|20)\d\d[.\-/ ]?(?:0[1-9]|1[0-2])[.\-/ ]?(?:0[1-9]|[12]\d|3[01])|"
    r"(?:0?[1-9]|[12]\d|3[01])[.\-/](?:0?[1-9]|1[0-2])"
    r"[.\-/](?:19|20)\d\d)(?:\D|\d{4}|\d{6}|$)"
)


def worth_a_look(texts: Sequence[str]) -> np.ndarray:
    """Which texts [n] may hold personal data: an at sign, seven digits within 18 characters, three points or two colons
    between digits. Of ordinary prose nine in ten do not, and this is a tenth of the work of looking."""
    raw = points(texts)
    ends = np.cumsum([len(t) + 1 for t in texts])
    digit = (raw >= 48) & (raw <= 57)
    at = np.flatnonzero(digit)
    many = at[:-6][at[6:] - at[:-6] < 18] if len(at) > 6 else at[:0]
    dots = np.flatnonzero((raw[1:-1] == 46) & digit[:-2] & digit[2:]) if len(raw) > 2 else at[:0]
    four = dots[:-2][dots[2:] - dots[:-2] < 9] if len(dots) > 2 else dots[:0]
    colons = np.flatnonzero(raw == 58)
    two = colons[:-1][colons[1:] - colons[:-1] < 6] if len(colons) > 1 else colons[:0]
    close = np.flatnonzero((raw == 93) | (raw == 41))  # of [at], (arroba) and the like
    close = close[close > 2]
    last, but_one = raw[close - 1], raw[close - 2]
    close = close[(but_one == 97) & (last == 116) | (but_one == 98) & (last == 97)]
    signs = np.concatenate([np.flatnonzero(raw == 64), close])
    found = np.zeros(len(texts), bool)
    found[np.searchsorted(ends, np.concatenate([many, four, two, signs]), "right")] = True
    return found


def find(text: str) -> list[Found]:
    """The personal data in `text`, in order; no two overlap."""
    taken: list[Found] = []
    for found in _every(text):
        if all(found.end <= t.start or found.start >= t.end for t in taken):
            taken.append(found)
    return sorted(taken)


def redact(text: str) -> tuple[str, list[str]]:
    """`text` with each piece of personal data replaced by its kind in brackets, such as [EMAIL], and the kinds."""
    found = find(text)
    for f in reversed(found):
        text = f"{text[: f.start]}[{f.kind.upper()}]{text[f.end :]}"
    return text, [f.kind for f in found]


def _every(text: str) -> Iterator[Found]:
    """Candidates, what is surest first."""
    for at in _signs(text):
        for m in EMAIL.finditer(text, max(0, at - 80), at + 120):
            if not FILES.fullmatch(m[1]) and not (m[0].startswith("git@") and text[m.end() : m.end() + 1] == ":"):
                yield Found(m.start() + len(m[0]) - len(m[0].lstrip(".'%-")), m.end(), "email")
    for colon in COLONS.finditer(text):
        for m in IPV6.finditer(text, max(0, colon.start() - 39), colon.start() + 44):
            if _ipv6(m[0]):
                yield Found(m.start(), m.end(), "ip")
    numbers = [m.span() for m in LONG_NUMBER.finditer(text)]
    if not numbers:
        yield from _ipv4(text)
        return
    for head in IBAN_HEAD.finditer(text):
        whole = IBAN.match(text, head.start() - 2) if head.start() > 1 else None
        if whole and (length := iban_length(whole[0])):
            yield Found(whole.start(), whole.start() + length, "iban")
    for start, end in numbers:
        for m in CARD.finditer(text, start, min(len(text), end + 2)):
            if is_card(re.sub(r"\D", "", m[0])):
                yield Found(m.start(), m.end(), "card")
        for m in DNI.finditer(text, max(0, start - 2), min(len(text), end + 3)):
            if is_dni(m[0]) and (m.end() == len(text) or not text[m.end()].isalnum()):
                yield Found(m.start(), m.end(), "dni")
    yield from _ipv4(text)
    for start, end in numbers:
        yield from _phones(text, start, end)


def _signs(text: str) -> Iterator[int]:
    spelt = any(end in text for end in ("at]", "at)", "ba]", "ba)"))
    return (m.start() for m in (SIGN if spelt else AT).finditer(text))


def _ipv4(text: str) -> Iterator[Found]:
    searched = (IPV4.search(text, max(0, f.start() - 2), f.end() + 4) for f in FOUR.finditer(text))
    for m in (m for m in searched if m):
        octets = [int(o) for o in m[0].split(".")]
        if max(octets) > 255 or any(len(o) > 1 and o[0] == "0" for o in m[0].split(".")):
            continue
        nobody = octets[0] in (0, 127, 255) or (text[m.end() : m.end() + 1] == "/" and octets[3] == 0)
        if not nobody and not VERSION.search(text[max(0, m.start() - 30) : m.start()]):
            yield Found(m.start(), m.end(), "ip")


def _ipv6(text: str) -> bool:
    groups = [g for g in text.split(":") if g]
    if not re.search(r"\d", text) or len(groups[0]) < 3 or len(groups) < 2:
        return False
    try:
        return not ipaddress.IPv6Address(text).is_loopback
    except ValueError:
        return False


def _phones(text: str, start: int, end: int) -> Iterator[Found]:
    low, high = max(0, start - 3), min(len(text), end + 2)
    before = text[max(0, start - 40) : start]
    if (
        before.rstrip(" $").endswith(tuple("=*/<>"))
        or OTHERWISE.search(before.rstrip("+( #:"))
        or OTHERWISE.search(before)
        or UNITS.match(text, end)
    ):
        return
    for i, pattern in enumerate(PHONES):
        for m in pattern.finditer(text, low, high):
            digits = re.sub(r"\D", "", m[0])
            if 9 <= len(digits) <= 15 and not (i and (DATE.match(m[0]) or is_isbn(digits))):
                yield Found(m.start(), m.end(), "phone")
    if says := list(SAYS.finditer(before)):
        between = before[says[-1].end() :]
        for m in BARE.finditer(text, low, high):
            digits = re.sub(r"\D", "", m[0])
            told = 7 <= len(digits) <= 12 and not DATE.match(m[0]) and not is_isbn(digits)
            if told and not re.search(r"\d{3}|[.!?]\s", between):
                yield Found(m.start(), m.end(), "phone")


def iban_length(text: str) -> int:
    """How many characters of `text` are an IBAN with the length of its country and the right checksum; 0 if none."""
    country = text[:2].upper()
    wanted = LENGTHS.get(country, 0)
    places = [i for i, character in enumerate(text, start=1) if character.isalnum()][:wanted]
    code = "".join(text[i - 1] for i in places).upper()
    if not wanted or len(code) != wanted or text[places[-1] : places[-1] + 1].isalnum():
        return 0
    taken = places[-1]
    number = "".join(str(int(c, 36)) for c in code[4:] + code[:4])
    return taken if int(number) % 97 == 1 else 0


def is_card(digits: str) -> bool:
    """Whether digits are a card's: an issuer's first digits and length, and Luhn's checksum."""
    if not ISSUERS.fullmatch(digits) or len(set(digits)) == 1:
        return False
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def is_dni(text: str) -> bool:
    """Whether a DNI's or NIE's letter is the one that its number asks for."""
    code = re.sub(r"[^0-9A-Z]", "", text.upper())
    number = code[:-1]
    if number[0] in "XYZ":
        number = f"{'XYZ'.index(number[0])}{number[1:]}"
    return number.isdigit() and len(number) == 8 and LETTERS[int(number) % 23] == code[-1]


def is_isbn(digits: str) -> bool:
    """Whether 13 digits are an ISBN, by prefix and checksum."""
    if len(digits) != 13 or not digits.startswith(("978", "979")):
        return False
    return sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10 == 0
