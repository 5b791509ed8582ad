"""Selectors: which sites of a network are meant."""

from __future__ import annotations

import functools
import re

from torch import nn

from structmat.network.sites import Site

Selector = str | type[nn.Module]
"""A regular expression that must match a module's whole name, or a module type."""


def matches(selector: Selector, site: Site) -> bool:
    """Whether a selector picks a site: by a name, written out or as a regular expression, or by a type.

    The names and types are those of the site and of the module that holds it.

    Args:
        selector: The selector.
        site: The site.

    Returns:
        Whether it does.
    """
    if isinstance(selector, str):
        return selector in site.all_names or any(_pattern(selector).fullmatch(name) for name in site.all_names)
    held = () if site.holder is None else (site.holder.module,)
    return any(isinstance(module, selector) for module in (site.module, *held))


@functools.lru_cache(maxsize=256)
def _pattern(selector: str) -> re.Pattern[str]:
    """A selector as a pattern; one that is no regular expression picks nothing but the name that it spells."""
    try:
        return re.compile(selector)
    except re.error:
        return re.compile(re.escape(selector))


def fault(selector: Selector) -> str:
    """What is wrong with a selector that is no regular expression, in brackets; empty where nothing is."""
    try:
        re.compile(selector if isinstance(selector, str) else "")
    except re.error as error:
        return f" (it is no regular expression: {error})"
    return ""


def spell(selector: Selector) -> str:
    """A selector as messages show it."""
    return repr(selector) if isinstance(selector, str) else selector.__name__
