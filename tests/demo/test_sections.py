"""Markdown to sections and blocks: what is cut where, and that shortening leaves Markdown whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.demo.sections import Block, Section, read_blocks, read_sections
from tests.demo.manual import MANUAL


def weigh_nothing(text: str) -> float:
    return 0.0


def weigh_marked(text: str) -> float:
    """The more stars, the heavier."""
    return float(text.count("*"))


def test_a_section_lasts_until_the_next_heading_of_any_level() -> None:
    """Small sections make precise answers; what stands above is remembered, without the document's title."""
    text = "# T\n\nintro\n\n## A\n\none\n\n### B ###\n\ntwo\n\n## C\n\nthree"
    assert read_sections("D.md", text) == [
        Section("D.md", "T", 1, (), "intro"),
        Section("D.md", "A", 2, (), "one"),
        Section("D.md", "B", 3, ("A",), "two"),
        Section("D.md", "C", 2, (), "three"),
    ]


def test_text_before_any_heading_goes_by_the_document_s_name() -> None:
    assert read_sections("D.md", "just text") == [Section("D.md", "D.md", 1, (), "just text")]


def test_a_heading_without_text_is_no_section() -> None:
    """It still tells what the sections below it are about."""
    assert [(section.heading, section.parents) for section in read_sections("D.md", "## A\n### B\ntext")] == [
        ("B", ("A",))
    ]


@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_a_comment_in_code_is_no_heading(fence: str) -> None:
    """A shell's comment looks like a title (CommonMark §4.5: the content of a fence is literal)."""
    text = f"## A\n\n{fence}sh\n# install\n{fence}\n"
    assert [section.heading for section in read_sections("D.md", text)] == ["A"]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("a <!-- note\nto self --> b", "a  b"),
        ("<p align='center'>a</p>", "a"),
        ("![logo](x.svg) a", "a"),
        ("[![build](b.svg)](https://example.org) a", "a"),
        ("see [the guide](docs/guide.md#top) now", "see the guide now"),
        ("see [it](https://example.org)", "see [it](https://example.org)"),
        ("`<b>` and `[x](y)`", "`<b>` and `[x](y)`"),
        ("<https://example.org> a < b > c", "<https://example.org> a < b > c"),
    ],
)
def test_what_makes_no_sense_outside_its_file_is_left_out(written: str, told: str) -> None:
    """Badges, HTML and links to neighbouring files are for the forge's page; code is never touched."""
    assert [section.body for section in read_sections("D.md", written)] == [told]


def test_code_keeps_its_tags_and_blank_lines() -> None:
    code = "```html\n<b>x</b>\n\n![a](b)\n```"
    assert [block.text for block in read_blocks(code)] == [code]


def test_a_block_ends_at_a_blank_line_or_where_its_kind_changes() -> None:
    text = "text\n- a\n  more\n- b\n\n| h |\n|---|\n| c |\n```\nx\n```\nend"
    assert [block.text for block in read_blocks(text)] == [
        "text",
        "- a\n  more\n- b",
        "| h |\n|---|\n| c |",
        "```\nx\n```",
        "end",
    ]


def test_what_a_colon_announces_stays_with_it() -> None:
    """ "Run this:" without the command would be no answer."""
    assert [block.text for block in read_blocks("Run this:\n\n```\nx\n```\n\nDone.")] == [
        "Run this:\n\n```\nx\n```",
        "Done.",
    ]


def test_a_paragraph_is_shortened_at_the_end_of_a_sentence() -> None:
    (block,) = read_blocks("One is. Two is! Three is.")
    shortened = block.shorten(18, weigh_nothing)
    assert shortened is not None
    assert shortened.text == "One is. Two is!"


def test_a_table_keeps_its_head_and_the_rows_that_were_asked_for() -> None:
    """In their order; a table without its head is no table."""
    (block,) = read_blocks("| h |\n|---|\n| a |\n| b* |\n| c |\n| d** |")
    shortened = block.shorten(26, weigh_marked)
    assert shortened is not None
    assert shortened.text == "| h |\n|---|\n| b* |\n| d** |"


def test_of_a_long_list_only_what_was_asked_for_is_told() -> None:
    """Also where the rest would fit: forty settings are no answer to a question about one."""
    (block,) = read_blocks("- a\n- b*\n- c")
    assert block.select(weigh_marked, above=2).text == "- b*"
    assert block.select(weigh_marked, above=3) == block
    assert block.select(weigh_nothing, above=2) == block


def test_shortened_code_still_closes_its_fence() -> None:
    (block,) = read_blocks("```sh\none\ntwo\nthree\n```")
    shortened = block.shorten(20, weigh_nothing)
    assert shortened is not None
    assert shortened.text == "```sh\none\ntwo\n```"


def test_code_that_its_document_does_not_close_is_closed() -> None:
    """CommonMark §4.5: an unclosed fence lasts to the end; what follows the excerpt must not fall into it."""
    assert read_blocks("```\nx")[0].text == "```\nx\n```"


def test_what_cannot_be_shortened_enough_is_none() -> None:
    assert Block("", ("a long sentence.",)).shorten(5, weigh_nothing) is None


@given(st.text(alphabet="#`~|-: \nab<>[]()!*1."))
def test_any_document_can_be_read(text: str) -> None:
    """Whatever the Markdown; and no block is longer than it was allowed to be."""
    for section in read_sections("D.md", text):
        for block in read_blocks(section.body):
            shortened = block.shorten(20, weigh_marked)
            assert shortened is None or len(shortened.text) <= 20


@pytest.mark.parametrize("name", MANUAL)
def test_nothing_of_the_manual_s_prose_is_lost(name: str) -> None:
    """Blocks joined are the section again."""
    for section in read_sections(name, MANUAL[name]):
        joined = "\n\n".join(block.text for block in read_blocks(section.body))
        assert joined.split() == section.body.split()
