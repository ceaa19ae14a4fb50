"""The arena's parsers on small samples in the formats that the packages ship."""

from __future__ import annotations

import json
import struct

from bench.arena import parsers
from bench.arena.rows import Row


def test_wordnet_joins_the_words_of_a_synset() -> None:
    head = "00001740 03 s 02 good_will(p) 0 kindness 1 001 @ 00002137 n 0000"
    line = f'{head} | being kind; "her kindness"  '
    assert list(parsers.wordnet(f"  1 licence text | no\n{line}")) == [
        Row("Define the adjective: good will, kindness", 'being kind; "her kindness"')
    ]


def test_foldoc_drops_links_and_dates() -> None:
    text = "bit bucket\n\n   <jargon> Where {lost\n   data} goes when it is lost.\n\n   (1999-01-02)\n"
    text += "\nbyte\n\n   x\n"
    assert list(parsers.foldoc(text)) == [
        Row("Explain the computing term: bit bucket", "<jargon> Where lost data goes when it is lost.")
    ]


def test_german_english_drops_grammar_and_examples() -> None:
    text = "\nHaus /haʊs/ <neut, n, sg>\n [arch.] house <n>\n see: {Bau}\n\nBaum /baʊm/ <masc>\ntree\n"
    assert list(parsers.german_english(text)) == [
        Row("Translate into English: Haus", "house"),
        Row("Translate into English: Baum", "tree"),
    ]


def compiled(pairs: dict[str, str]) -> bytes:
    """Return a .mo file; its strings follow the two tables."""
    count = len(pairs)
    texts = [text.encode() for column in (pairs.keys(), pairs.values()) for text in column]
    offset = 28 + 16 * count
    table, body = b"", b""
    for text in texts:
        table += struct.pack("<2I", len(text), offset + len(body))
        body += text + b"\x00"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + table + body


def test_messages_skip_the_header_and_the_untranslated() -> None:
    data = compiled(
        {
            "": "Content-Type: text/plain; charset=UTF-8",
            "menu\x04cannot open file": "Datei kann nicht geöffnet werden",
            "one open file\x00%d open files": "eine offene Datei\x00%d offene Dateien",
            "not translated": "not translated",
        }
    )
    assert list(parsers.messages(data, "German")) == [
        Row("Translate into German: cannot open file", "Datei kann nicht geöffnet werden"),
        Row("Translate into German: one open file", "eine offene Datei"),
    ]


def test_a_function_is_cut_after_its_docstring() -> None:
    source = '''
class Box:
    def total(self, items):
        """Add the sizes of the items."""
        sizes = [item.size for item in items]
        return sum(sizes)

    def plain(self):
        return 1
'''
    [row] = parsers.python_functions(source)
    assert row.prompt.endswith('def total(self, items):\n    """Add the sizes of the items."""')
    assert row.completion == "sizes = [item.size for item in items]\nreturn sum(sizes)"
    assert list(parsers.python_functions("print 'Python 2'")) == []


def test_a_manual_page_gives_a_row_for_each_section() -> None:
    page = r""".\" comment
.TH paint 3 2026-01-01 "Pages"
.SH NAME
paint \- colour a wall
.SH DESCRIPTION
The
.BR paint ()
function colours the wall that
.I wall
names with \fBred\fP paint.
.PP
It never fails.
.SH BUGS
None.
"""
    text = "The\npaint()\nfunction colours the wall that\nwall\nnames with red paint.\n\nIt never fails."
    assert list(parsers.manual_page(page)) == [
        Row("Write the section DESCRIPTION of the manual page paint(3): paint - colour a wall", text)
    ]


def test_a_fortune_is_cut_between_words() -> None:
    first = "A journey of a thousand miles begins with a single step, they say."
    [row] = parsers.fortunes(f"{first}\n%\ntoo short\n%\n", "English")
    start = row.prompt.removeprefix("Continue this English text: ")
    assert f"{start} {row.completion}" == first
    assert len(start) <= len(first) * 0.4


def test_annotations_need_a_name_and_keywords() -> None:
    text = (
        '<ldml><annotations><annotation cp="x">cross | letter</annotation>'
        '<annotation cp="x" type="tts">ex</annotation><annotation cp="y" type="tts">why</annotation>'
        "</annotations></ldml>"
    )
    [row] = parsers.emoji(text, "English")
    assert row.prompt == "Describe x in English as JSON."
    assert json.loads(row.completion) == {"name": "ex", "keywords": ["cross", "letter"]}
