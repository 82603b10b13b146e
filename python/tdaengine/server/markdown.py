"""Markdown of answers as HTML, for the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

# Markup in the text stays text, links run no scripts, and pictures, which would be loaded from
# elsewhere, stay links.
RENDERER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
RENDERER.disable("image")
MOST_CHARACTERS = 50_000  # beyond them an answer is shown as it is


def _link(
    renderer: RendererHTML, tokens: Sequence[Token], i: int, options: OptionsDict, env: EnvType
) -> str:
    """Opens beside the page, which holds the conversation."""
    tokens[i].attrSet("target", "_blank")
    tokens[i].attrSet("rel", "noopener noreferrer")
    return renderer.renderToken(tokens, i, options, env)


RENDERER.add_render_rule("link_open", _link)


def to_html(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        return f"<pre>{escape(text)}</pre>"
    return str(RENDERER.render(text))
