"""Names that are made to do harm where they are shown: on terminals, in cards, in plots; and regular expressions."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from safemerge_fast import AdapterError, merge
from safemerge_fast.patterns import ModulePatterns, compile_pattern
from safemerge_fast.printable import code, fenced, markdown, plot_label, printable

# Beside other work on the machine any call may take long.
relaxed = settings(deadline=None)

HOSTILE = [
    "](javascript:alert(1))",
    "[x](javascript:alert(1))",
    "![x](https://tracker.example/x.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "`<b>`",
    "``` \n<b>x</b>\n```",
    "---\nlicense: mit\n---",
    "a|b|<i>c</i>",
    "https://evil.example",
    "<https://evil.example>",
    "\x1b[31mred\x1b[0m",
    "a\u202eb",
    "a\udcffb",
    "# heading",
    "*a* _b_ ~~c~~",
    "\\",
    " ",
    "`",
    "\\`<b>",
]


class Tags(HTMLParser):
    """Collects the tags and links of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(text: str) -> Tags:
    """As the Hub shows it: with tables, and with HTML that stands in the text let through."""
    return Tags(MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(text))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_markdown_is_text(name: str) -> None:
    shown = printable(name)
    plain = rendered(f"a {markdown(name)} b")
    assert (plain.tags, plain.links) == (["p"], [])
    assert plain.text.split() == ["a", *shown.split(), "b"]
    inline = rendered(f"a {code(name)} b")
    assert (inline.tags, inline.links) == (["p", "code"], [])
    assert shown.strip() in inline.text
    cell = rendered(f"| x |\n|---|\n| {code(name, in_table=True)} |\n| {markdown(name)} |")
    assert set(cell.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert cell.tags.count("td") == 2
    block = rendered(fenced("yaml", name))
    assert block.tags == ["pre", "code"]


@relaxed
@given(st.text())
def test_any_name_in_markdown_is_text(name: str) -> None:
    page = rendered(f"a {markdown(name)} b {code(name)}")
    assert set(page.tags) <= {"p", "code"}
    assert rendered(fenced("sh", name)).tags == ["pre", "code"]


@relaxed
@given(st.text(alphabet=st.characters(), max_size=500))
def test_what_is_printable_is_one_short_line(name: str) -> None:
    shown = printable(name, 50)
    assert shown.isprintable()
    shown.encode()  # no halves of surrogate pairs
    if name.isprintable() and len(name) <= 50:
        assert shown == name
    if len(name) > 50:
        assert "…" in shown
        assert len(shown) <= 50 * len(r"\U0010ffff")


def test_a_plot_shows_formulas_as_they_are(tmp_path: Path) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    for name in ("$\\frac{$", "$x$", "a$b", "_hidden", "\\$x\\$", "$\x1b$", "\\", "$$"):
        figure = figure_module.Figure()
        axes = figure.subplots()
        axes.plot([0], [0], label=plot_label(name))
        axes.set_title(plot_label(name))
        legend = figure.legend()
        figure.savefig(tmp_path / "plot.svg", format="svg")
        assert len(legend.get_texts()) == 1, name
        assert ElementTree.parse(tmp_path / "plot.svg")


def test_a_card_of_hostile_names(make_quartet: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    made = make_quartet(tmp_path / "made", shards=1, layers=1)
    quartet = {}
    for role, name in zip(
        made, ("](javascript:alert(1))<script>", "`a|b`\n---\n", "```\n# x", "<b>$x$</b>"), strict=True
    ):
        quartet[role] = tmp_path / name
        shutil.move(made[role], quartet[role])
    # It looks like the Hub's cache, but no repository has such a name.
    false = tmp_path / "models--org--x: y\n---\nlicense: mit/snapshots/0"
    false.parent.mkdir(parents=True)
    shutil.move(quartet["safe"], false)
    quartet["safe"] = false
    output = tmp_path / "out](javascript:x)<i>"
    merge(**quartet, output=output)
    text = (output / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "\x1b" not in text
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"base_model_relation", "library_name", "tags", "base_model"}
    assert not data["base_model"]
    page = rendered(text.split("---\n", 2)[2])
    assert set(page.links) == {"https://arxiv.org/abs/2503.17239", "https://pypi.org/project/safemerge-fast/"}
    assert not set(page.tags) & {"script", "i", "b", "img", "hr", "em"}
    assert page.tags.count("h1") == 1
    assert page.tags.count("pre") == 2


# --- regular expressions --------------------------------------------------------------------------


@pytest.mark.parametrize("text", [r"(a+)+$", r"(\w+\.?)+\d$", r"(a|a)*b", r"(.*)*x", r"(?:a?){50}a{50}$"])
def test_backtracking_has_nothing_to_go_back_to(text: str) -> None:
    pattern = compile_pattern("--include", text, AdapterError)
    for length in (30, 30_000):
        # Backtracking would take 2 ** 30 steps already for the shorter name, and never end for the longer one.
        assert not pattern.search("a" * length + "!")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(?=x)", "look-around"),
        ("(?<!x)y", "look-around"),
        (r"(a)\1", "backreferences"),
        ("(", "unclosed group"),
        ("a)|(b", "unopened group"),
        ("((a{99}){99}){99}", "too large"),
        ("(" * 100 + ")" * 100, "nested"),
        ("\udcff", "surrogates"),
        ("[\x1b", "unclosed"),
    ],
)
def test_what_is_not_supported_is_said(text: str, reason: str) -> None:
    with pytest.raises(AdapterError) as caught:
        compile_pattern("--include", text, AdapterError)
    message = str(caught.value)
    assert message.startswith("--include: '")
    assert "is not a regular expression" in message
    assert reason in message
    assert message.isprintable()


def test_a_comment_at_the_end_ends_with_the_expression() -> None:
    assert compile_pattern("x", "(?x) q # a comment", AdapterError).fullmatch("q")


NAMES = ["model.layers.1.self_attn.q_proj", "q_proj", "layers.10.mlp.up_proj", "xq_proj", "lm_head", "Q_proj"]


@relaxed
@given(
    st.lists(
        st.sampled_from(
            [
                "q_proj",
                r"layers\.1\.",
                r".*q_proj",
                "proj",
                r"layers\.\d+\..*_proj",
                "up_proj|lm_head",
                "^q_proj",
                "[Qq]_proj",
                "a)|(lm_head",
            ]
        ),
        unique=True,
    )
)
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    """The oracle is the line of PEFT that does it, with Python's own engine."""
    values = {pattern: float(number) for number, pattern in enumerate(patterns)}
    ours = ModulePatterns("alpha_pattern", values, AdapterError)
    for name in NAMES:
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
        assert ours.first(name, -1.0) == (-1.0 if key is None else values[key])


def test_flags_in_the_middle_of_peft_s_expression() -> None:
    ours = ModulePatterns("rank_pattern", {"(?i)Q_PROJ": 3}, AdapterError)
    assert ours.first("model.layers.0.self_attn.q_proj", 8) == 3
    assert ours.first("model.layers.0.self_attn.k_proj", 8) == 8
