from tests.comfyui.fixtures import (  # noqa: F401
    faults,
    installation,
    model_files,
    native_latents,
    native_server,
    reference,
    server,
    start_server,
)

collect_ignore = ["test_pack"]
