"""What is said where the devices of a VAE's tiles differ."""

from __future__ import annotations

from parallel.vae.devices import unequal


def test_devices_of_one_model_need_no_remark():
    assert unequal(["NVIDIA H200"] * 4) == "" == unequal(["CPU"]) == unequal([])


def test_models_that_differ_are_named_once_each():
    remark = unequal(["NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"])
    assert remark.endswith("as these differ: NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 5090")
