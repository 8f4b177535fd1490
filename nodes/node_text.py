"""What a node did, as text on it and in the log."""

from __future__ import annotations

import logging

log = logging.getLogger("sequence_parallel")


def tell(node_id: str | None, text: str) -> None:
    """Shows `text` on the node, where there is one and a server."""
    from server import PromptServer  # only a running ComfyUI has it

    log.info("%s", text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
