"""Rows of tables that are chats or instructions with answers, as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
"""The usual names of a column of chats, each a list of messages."""

ASKED = ("instruction", "prompt", "question", "query")
GIVEN = ("input", "context")
ANSWERED = ("output", "response", "completion", "answer", "chosen")
"""The usual names of the columns of instructions, of what an instruction is about, and of answers."""

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Roles that chat templates call otherwise."""

Message = Mapping[str, str]
"""A message with its ``"role"`` and its ``"content"``."""


def is_chat(value: Any) -> bool:
    """Whether a value of a table is a list of messages."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, Mapping) for one in value)


def chat_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a table whose values are chats, those with usual names first, by one row of it."""
    found = [name for name, value in row.items() if is_chat(value) and value]
    return sorted(found, key=lambda name: name not in CHAT_COLUMNS)


def instruction_columns(columns: Sequence[str]) -> tuple[str, str | None, str] | None:
    """The columns of the instruction, of what it is about, and of the answer; None where a table has no such columns.

    Args:
        columns: The columns that hold strings.

    Returns:
        The three names, the second None where there is no such column.
    """
    asked, given, answered = (
        next((name for name in names if name in columns), None) for names in (ASKED, GIVEN, ANSWERED)
    )
    return None if asked is None or answered is None else (asked, given, answered)


def instruction_chat(row: Mapping[str, Any], columns: tuple[str, str | None, str]) -> list[Message]:
    """An instruction and its answer as a chat of two messages."""
    asked, given, answered = columns
    about = row[given] if given is not None else ""
    question = "\n\n".join(text for text in (row[asked], about) if text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row[answered] or ""}]


def messages_of(chat: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages of a chat as templates take them.

    Args:
        chat: Messages with ``role`` and ``content``, or with ``from`` and ``value``; a content may be a list of parts.

    Returns:
        The messages, those without text left out.

    Raises:
        ValueError: If a message has neither.
    """
    found: list[Message] = []
    for message in chat:
        role, content = message.get("role") or message.get("from"), message.get("content") or message.get("value") or ""
        if not isinstance(role, str):
            raise ValueError(f"expected messages with 'role' and 'content', got {', '.join(map(repr, message))}")
        if not isinstance(content, str):
            content = "\n".join(part["text"] for part in content if isinstance(part, Mapping) and part.get("text"))
        if content.strip():
            found.append({"role": ROLES.get(role, role), "content": content.strip()})
    return found


def chat_text(chat: Sequence[Mapping[str, Any]], tokenizer: Any = None, *, answering: bool = False) -> str:
    """Write a chat as the text that a model reads.

    Args:
        chat: The messages.
        tokenizer: The tokenizer, whose chat template is used; None for none.
        answering: Whether the text ends where the model is to answer.

    Returns:
        The text by the template; the contents with blank lines between them where there is no template.
    """
    messages = messages_of(chat)
    if getattr(tokenizer, "chat_template", None) is None or not messages:
        return "\n\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
