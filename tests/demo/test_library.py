"""The demo's answers: who speaks, what is told, and how to get a real model."""

from __future__ import annotations

import pytest

from server.demo.library import CLOSING, DEMO_SENTENCE, Library
from server.demo.tokens import split_tokens
from tests.demo.manual import MANUAL

QUESTIONS = {
    "What is Sluice?": "token by token, from any OpenAI-compatible endpoint",
    "How do I start it?": "make run",
    "how can i RESUME a stream after my connection dropped?": "`Last-Event-ID`",
    "What happens when a client is rate limited?": "429",
    "How do I run it behind nginx?": "proxy_buffering off",
    "Does it work with systemd?": "Socket activation",
    "How do I monitor it?": "Prometheus reads `/metrics`",
    "Can I scale it to a cluster of machines?": "With Redis",
    "What's new in the latest release?": "Sharing across machines",
    "How do I run the tests?": "`make test`",
    "SLUICE_HEARTBEAT": "seconds of silence before a heartbeat",
    "Configuration": "Everything is an environment variable.",
    "Wie ändere ich denn nun bloß das Rate Limit?": "429",
    "请问如何使用 Redis?": "With Redis",
}
STRANGE = {
    "off the subject": "Why is the sky blue?",
    "half on it": "Does Sluice brew coffee for astronauts?",
    "chinese": "什么是流式传输",
    "arabic": "ما هو هذا المشروع؟",
    "hindi": "यह क्या है?",
    "emoji": "👩‍👩‍👧 🇩🇪 👍🏽",
    "marks only": "\u0301\u200d\ufe0f",
    "lone surrogate": "\ud83d",
    "control": "\x00\x1b[31m",
    "markdown": "``` # [x](y) <script>|",
    "a pattern": r"(.*)+\1 %s {0}",
}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(MANUAL)


def told(answer: str) -> str:
    """What stands between the sentence that opens every answer and the one that ends it."""
    assert answer.startswith(DEMO_SENTENCE + "\n\n")
    assert answer.endswith("\n\n" + CLOSING)
    return answer[len(DEMO_SENTENCE) : -len(CLOSING)].strip()


@pytest.mark.parametrize("question", [*QUESTIONS, *STRANGE.values(), "", "hi"])
def test_every_answer_says_that_it_is_the_demo_and_how_to_connect_a_real_model(library: Library, question: str) -> None:
    """Nobody may take it for a language model; the first sentence tells, the last names the three settings."""
    told(library.answer(question))
    assert "embedded demo model, not an LLM" in DEMO_SENTENCE
    assert all(name in CLOSING for name in ("`LLM_BASE_URL`", "`LLM_API_KEY`", "`LLM_MODEL`"))


@pytest.mark.parametrize(("question", "fact"), QUESTIONS.items())
def test_a_question_gets_the_section_that_fits(library: Library, question: str, fact: str) -> None:
    """First, before any second section."""
    first_section = told(library.answer(question)).split("\n### ")[0]
    assert fact in first_section


def test_the_heading_that_is_the_question_wins_over_sections_that_say_more_of_it() -> None:
    """ "What is Sluice?" is for the introduction, though every section has the name more often."""
    chatty = "Sluice and Sluice and once more Sluice. "
    text = f"# Sluice\n\nA relay for tokens.\n\n## Running Sluice\n\n{chatty}\n\n## Measuring Sluice\n\n{chatty}"
    assert told(Library({"README.md": text}).answer("What is Sluice?")).startswith("### Sluice\n\nA relay for tokens.")


@pytest.mark.parametrize("topic", Library(MANUAL).topics)
def test_every_topic_that_it_names_can_be_asked_about(library: Library, topic: str) -> None:
    answer = told(library.answer(topic))
    assert answer.startswith("### ")
    assert "*From " in answer


@pytest.mark.parametrize("question", STRANGE.values(), ids=STRANGE)
def test_a_question_that_nothing_fits_gets_the_topics(library: Library, question: str) -> None:
    """In any script, without an error and without a guess."""
    answer = told(library.answer(question))
    assert "- Quick start\n- Configuration\n- Resuming\n" in answer
    assert "###" not in answer


@pytest.mark.parametrize("question", ["Hi!", "hello", "", "Who are you?", "What can you do?", "thanks"])
def test_a_greeting_is_returned_with_the_topics(library: Library, question: str) -> None:
    assert told(library.answer(question)).startswith("Hello! Ask it about one of these, in English:\n\n- Quick start\n")


def test_topics_are_the_first_document_s_sections_and_the_others_names(library: Library) -> None:
    """A heading that only holds others is a topic too; a release's number is none."""
    assert library.topics == (
        *("Quick start", "Configuration", "Resuming", "Deployment", "Metrics", "Several machines"),
        *("Changelog", "Contributing"),
    )


def test_an_answer_names_its_document_and_keeps_its_markdown(library: Library) -> None:
    assert told(library.answer("Quick start")) == (
        "### Quick start\n\nOne command is enough:\n\n"
        "```sh\n# builds .venv, then starts the server\nmake run\n```\n\n"
        "Then open http://127.0.0.1:4001. More in the guide and at [OpenAI](https://openai.com/docs).\n\n"
        "*From README.md*"
    )


def test_asked_about_one_setting_it_tells_that_row_alone(library: Library) -> None:
    answer = told(library.answer("What is the default of SLUICE_PORT?"))
    assert [line for line in answer.splitlines() if line.startswith("| `")] == [
        "| `SLUICE_PORT` | `4001` | the public listener |"
    ]


def test_an_answer_fits_the_default_bound_however_long_the_documentation() -> None:
    """SLUICE_MAX_TOKENS is 800 by default: the closing sentence must not be cut off."""
    rows = "".join(f"| `SLUICE_X{n}` | streams of things and of further things |\n" for n in range(500))
    prose = "A stream is a stream, and more streams are more. " * 200
    text = f"# Streams\n\n{prose}\n\n## Streams again\n\n{prose}\n\n| a | b |\n| --- | --- |\n{rows}"
    answer = Library({"README.md": text}).answer("Tell me about streams")
    assert "*From README.md*" in told(answer)
    assert len(split_tokens(answer)) < 600


def test_a_question_as_long_as_a_body_may_be_is_answered(library: Library) -> None:
    assert "With Redis" in library.answer("redis " * 170_000)


@pytest.mark.parametrize(
    "documents", [{}, {"README.md": ""}, {"README.md": "# Sluice\n"}], ids=["none", "empty", "title"]
)
def test_without_documentation_it_says_so(documents: dict[str, str]) -> None:
    """An installation may lack the files; the demo runs nevertheless."""
    assert "found no documentation" in told(Library(documents).answer("What is Sluice?"))


def test_a_document_without_headings_is_a_topic_by_its_name() -> None:
    library = Library({"NOTES.md": "Sluice streams tokens."})
    assert library.topics == ("NOTES.md",)
    assert "Sluice streams tokens." in library.answer("Which tokens?")
