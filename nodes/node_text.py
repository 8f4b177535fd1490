"""Texts about a node's work, shown on the node and in the log."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context

from ..parallel.comfyui import contract
from ..parallel.host import status

log = logging.getLogger("sequence_parallel")


def show(node_id: str | None, text: str) -> None:
    """Shows `text` on the node, if there are a node and a server; js/panel/node_texts.js keeps it there."""
    from server import PromptServer  # only a running ComfyUI has it

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and contract.fits("texts"):
        server.send_progress_text(text, node_id)
        server.send_sync("sequence_parallel.text", {"node": node_id, "text": text}, server.client_id)


def tell(node_id: str | None, text: str) -> None:
    """Logs `text` and shows it on the node."""
    log.info("%s", text)
    show(node_id, text)


def tell_fallback(node_id: str | None, text: str, notice: str | None = None) -> None:
    """Logs `text`, shows it on the node, and notifies the browser: the work runs otherwise than the user may expect.

    Args:
        notice: `text` without the parts that differ each time, such as a duration: the browser shows equal ones once.
    """
    tell(node_id, text)
    status.tell(status.FALLBACK, notice or text)


def executing_node() -> str | None:
    """Returns the id of the node that runs in this thread, or None."""
    context = get_executing_context()
    return None if context is None else context.node_id
