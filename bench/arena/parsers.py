"""Parsers of the formats that the arena's packages ship; each returns rows."""

from __future__ import annotations

import ast
import json
import re
import struct
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from bench.arena.rows import Row

WORDNET_POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
MESSAGE_BYTES = 12, 600
FORTUNE_BYTES = 60, 1500
MANUAL_BYTES = 40, 3000
CODE_BYTES = 40, 2500
ENTRY_BYTES = 20, 2500


def wordnet(text: str) -> Iterator[Row]:
    """Yield word -> gloss from a WordNet data file."""
    for line in text.splitlines():
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        if not gloss or line.startswith("  ") or len(fields) < 5:
            continue
        names = [field.replace("_", " ") for field in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
        names = [re.sub(r"\(\w+\)$", "", name) for name in names]
        yield Row(f"Define the {WORDNET_POS[fields[2]]}: {', '.join(names)}", gloss.strip())


def dict_entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield headword and body from the text of a dictd database with unindented headwords."""
    head, body = "", list[str]()
    blank = True
    for line in [*text.splitlines(), "", "END"]:
        if blank and line and not line[0].isspace():
            if head and body:
                yield head, "\n".join(body).strip("\n")
            head, body = line.strip(), []
        else:
            body.append(line)
        blank = not line.strip()


def foldoc(text: str) -> Iterator[Row]:
    """Yield term -> explanation from the Free On-line Dictionary of Computing."""
    for head, body in dict_entries(text):
        plain = textwrap.dedent(body.expandtabs(4))
        plain = re.sub(r"\{([^{}]*)\}", lambda match: " ".join(match[1].split()), plain)
        plain = re.sub(r"\n*\(\d{4}-\d\d-\d\d\)\s*$", "", plain).strip()
        if ENTRY_BYTES[0] <= len(plain.encode()) <= ENTRY_BYTES[1]:
            yield Row(f"Explain the computing term: {head}", plain)


def german_english(text: str) -> Iterator[Row]:
    """Yield German word -> English words from the text of FreeDict's German-English database."""
    blocks = re.split(r"\n(?=\S[^\n]* /[^\n]*/)", text)
    for block in blocks:
        head, _, rest = block.partition("\n")
        match = re.match(r"(\S[^/\n]*?) /[^/\n]*/", head)
        if not match:
            continue
        senses = []
        for line in rest.splitlines():
            if not line.strip() or re.match(r"\s*(see:|Note:|Synonym|Antonym|\")", line):
                break
            senses.append(re.sub(r"\s*[<\[][^<>\[\]]*[>\]]\s*", " ", line).strip())
        meaning = " ".join(" ".join(senses).split())
        if meaning:
            yield Row(f"Translate into English: {match[1]}", meaning)


def catalogue(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield original and translation from a compiled gettext catalogue (.mo)."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for number in range(count):
        pair = []
        for table in (originals, translations):
            length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * number)
            pair.append(data[offset : offset + length])
        original, translation = (part.split(b"\x00")[0].decode("utf-8", "replace") for part in pair)
        if original:
            yield original.rpartition("\x04")[2], translation


def messages(data: bytes, language: str) -> Iterator[Row]:
    """Yield English message -> translation from a catalogue in UTF-8."""
    for original, translation in catalogue(data):
        size = len(original.encode())
        if MESSAGE_BYTES[0] <= size <= MESSAGE_BYTES[1] and "\ufffd" not in translation != original:
            yield Row(f"Translate into {language}: {original.strip()}", translation.strip())


def python_functions(source: str) -> Iterator[Row]:
    """Yield signature and docstring -> body from a Python module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not ast.get_docstring(node):
            continue
        start, end = node.body[1].lineno - 1, node.end_lineno or node.lineno
        if node.body[1].lineno <= (node.body[0].end_lineno or 0):
            continue
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        body = textwrap.dedent("\n".join(lines[start:end])).strip("\n")
        if CODE_BYTES[0] <= len(body.encode()) <= CODE_BYTES[1] and len(head.encode()) <= 2000:
            yield Row(f"Write the body of this Python function.\n\n{head}", body)


def _plain_roff(line: str) -> str:
    line = re.sub(r"\\f(?:\[\w*\]|\(..|.)", "", line)
    line = re.sub(r"\\(?:s[-+]?\d|[|&^/,%:])", "", line).replace(r"\(bu", "*")
    line = line.replace("\\-", "-").replace("\\e", "\\").replace(r"\(aq", "'").replace(r"\(dq", '"')
    return re.sub(r"\\(?:\((..)|\[(\w+)\])", lambda match: match[1] or match[2] or "", line).replace(
        "\\ ", " "
    )


def _roff_lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield macro name ("" for text) and plain argument of each line of a page."""
    for raw in text.splitlines():
        if raw.startswith((".\\", "'\\", "'")):
            continue
        match = re.match(r"\.\s*(\w+)\s*(.*)", raw)
        macro, rest = (match[1], match[2]) if match else ("", raw)
        rest = re.sub(r'\s*\\".*', "", rest)
        if macro in ("BR", "RB", "BI", "IB", "IR", "RI"):
            parts = re.findall(r'"([^"]*)"|(\S+)', rest)
            rest = "".join(quoted or bare for quoted, bare in parts)
        elif macro:
            rest = rest.replace('"', "")
        yield macro, _plain_roff(rest)


def manual_page(text: str) -> Iterator[Row]:
    """Yield page and heading -> text from the source of a manual page (man macros)."""
    title, name, heading, body = "", "", "", list[str]()
    for macro, line in [*_roff_lines(text), ("SH", "")]:
        if macro == "TH":
            page, section = [*line.split(), "", ""][:2]
            title = f"{page}({section})"
        elif macro in ("SH", "SS"):
            plain = re.sub(r"\n{3,}", "\n\n", "\n".join(body)).strip()
            if heading == "NAME":
                name = " ".join(plain.split())
            elif heading and name and MANUAL_BYTES[0] <= len(plain.encode()) <= MANUAL_BYTES[1]:
                yield Row(f"Write the section {heading} of the manual page {title}: {name}", plain)
            heading, body = line.strip(), []
        elif macro in ("", "B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM"):
            body.append(line)
        elif macro in ("PP", "P", "LP", "TP", "IP"):
            body.append("" if macro != "IP" or not line else "\n" + line.split(" ")[0])


def fortunes(text: str, language: str) -> Iterator[Row]:
    """Yield first half -> second half of each fortune, cut between words or lines."""
    for piece in re.split(r"\n%[^\n]*\n", text):
        plain = re.sub(r"[ \t]+\n", "\n", piece.expandtabs(4)).strip()
        if not FORTUNE_BYTES[0] <= len(plain.encode()) <= FORTUNE_BYTES[1] or "\ufffd" in plain:
            continue
        cuts = [match.end() for match in re.finditer(r"\s+", plain) if match.end() <= len(plain) * 0.4]
        if cuts:
            yield Row(f"Continue this {language} text: {plain[: cuts[-1]].strip()}", plain[cuts[-1] :])


def emoji(text: str, language: str) -> Iterator[Row]:
    """Yield character -> JSON of its name and keywords from a CLDR annotation file."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for node in ET.fromstring(text).iter("annotation"):
        character, value = node.get("cp", ""), node.text or ""
        if node.get("type") == "tts":
            names[character] = value
        else:
            keywords[character] = [part.strip() for part in value.split("|")]
    for character, name in names.items():
        if words := keywords.get(character):
            found = json.dumps({"name": name, "keywords": words}, ensure_ascii=False)
            yield Row(f"Describe {character} in {language} as JSON.", found)
