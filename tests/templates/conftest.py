from tests.comfyui.fixtures import installation  # noqa: F401

collect_ignore = ["stand_ins"]
