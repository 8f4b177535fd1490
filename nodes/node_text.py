"""What a node did, as text on it and in the log."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context

from ..parallel.comfyui import contract
from ..parallel.host import status

log = logging.getLogger("sequence_parallel")


def show(node_id: str | None, text: str) -> None:
    """Shows `text` on the node, where there is one and a server; js/panel/node_texts.js keeps it there."""
    from server import PromptServer  # only a running ComfyUI has it

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and contract.fits("texts"):
        server.send_progress_text(text, node_id)
        server.send_sync("sequence_parallel.text", {"node": node_id, "text": text}, server.client_id)


def tell(node_id: str | None, text: str) -> None:
    """The same, and a line in the log."""
    log.info("%s", text)
    show(node_id, text)


def tell_fallback(node_id: str | None, text: str, notice: str | None = None) -> None:
    """The same, and a notice in the browser: something runs other than the user may think.

    Args:
        notice: the text without what differs each time, such as a duration: the browser shows equal ones once.
    """
    tell(node_id, text)
    status.tell(status.FALLBACK, notice or text)


def executing_node() -> str | None:
    """The node that runs in this thread."""
    context = get_executing_context()
    return None if context is None else context.node_id
